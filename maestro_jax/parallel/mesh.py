"""The device mesh: axes `data` (replicas), `fsdp` (parameter shards), `tensor` (heads and MLP)."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.config import MeshConfig

BATCH_AXES = ("data", "fsdp")  # groups are spread over both


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh.

    Raises:
      ConfigError: the axes do not multiply to the devices at hand, more than one is left open, or the tensor axis does
        not fit into a process.
    """
    devices = devices or jax.devices()
    processes = len({device.process_index for device in devices})
    sizes = axis_sizes(config, len(devices), processes)
    return Mesh(_arranged(tuple(sizes.values()), devices, processes), tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def axis_sizes(config: MeshConfig, devices: int, processes: int) -> dict[str, int]:
    """Devices per axis, when so many devices belong to so many processes, to each the same number.

    Raises:
      ConfigError: as `make_mesh`.
    """
    sizes = dict(dataclasses.asdict(config))
    spelled = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ConfigError(
            f"mesh {spelled}: one axis may be -1, the others must be at least 1; "
            "set config.mesh.fsdp=-1 and the other axes to 1"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % known == 0:
        sizes[open_axes[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh {spelled} needs {abs(math.prod(sizes.values()))} devices, found {devices}; "
            f"set config.mesh.fsdp=-1 and the other axes to 1, or to divisors of {devices}"
        )
    local = devices // processes
    if local % sizes["tensor"]:  # an episode is served by one process (rollout/engine.py)
        raise ConfigError(
            f"mesh {spelled}: tensor={sizes['tensor']} does not divide the {local} devices of a process; "
            f"set config.mesh.tensor to a divisor of {local}, or run one process for all devices of a machine"
        )
    return sizes


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device], processes: int) -> np.ndarray:
    """Devices `[data, fsdp, tensor]`: neighbours in the mesh are neighbours of the interconnect."""
    data, fsdp, tensor = shape
    if tensor == 1 or processes == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # JAX lays an axis along one of the slice's, which leaves a machine after two chips. So a mesh of each process's
    # devices, and a mesh of these: the local batch shards are as many of fsdp as divide it, the others of data.
    local = len(devices) // processes // tensor
    along_fsdp = math.gcd(local, fsdp)
    along_data = local // along_fsdp
    inside, outside = (along_data, along_fsdp, tensor), (data // along_data, fsdp // along_fsdp, 1)
    return mesh_utils.create_hybrid_device_mesh(
        inside, outside, devices, process_is_granule=True, allow_split_physical_axes=True
    )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the groups of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
