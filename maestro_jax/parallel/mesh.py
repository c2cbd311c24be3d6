"""The device mesh: axes `data` (replicas), `fsdp` (parameter shards), `tensor` (heads and MLP)."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from maestro_jax.errors import ConfigError

BATCH_AXES = ("data", "fsdp")  # groups are spread over both


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 on one axis means all that are left."""

    data: int
    fsdp: int
    tensor: int


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh.

    Raises:
      ConfigError: the axes do not multiply to the devices at hand, or more than one is left open.
    """
    devices = devices or jax.devices()
    sizes = dict(dataclasses.asdict(config))
    spelled = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ConfigError(
            f"mesh {spelled}: one axis may be -1, the others must be at least 1; "
            "set config.mesh.fsdp=-1 and the other axes to 1"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {spelled} needs {abs(math.prod(sizes.values()))} devices, found {len(devices)}; "
            f"set config.mesh.fsdp=-1 and the other axes to 1, or to divisors of {len(devices)}"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the groups of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
