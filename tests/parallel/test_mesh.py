"""Meshes of eight fake devices, and the errors of wrong ones."""

import jax
import pytest

from maestro_jax.aot.topology import tpu_target
from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, axis_sizes, batch_shards, make_mesh


@pytest.fixture
def devices() -> list[jax.Device]:
    return jax.devices()[:8]


@pytest.mark.parametrize(
    ("axes", "shape"),
    [((2, 2, 2), (2, 2, 2)), ((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 4, 2), (1, 4, 2))],
    ids=str,
)
def test_sizes_and_the_open_axis(axes: tuple[int, ...], shape: tuple[int, ...], devices: list[jax.Device]) -> None:
    mesh = make_mesh(MeshConfig(*axes), devices)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert batch_shards(mesh) == shape[0] * shape[1]
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in devices]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((1, 8, 2), r"mesh data=1 x fsdp=8 x tensor=2 needs 16 devices, found 8; set config.mesh.fsdp=-1"),
        ((1, -1, 3), r"found 8; set config.mesh.fsdp=-1 and the other axes to 1, or to divisors of 8"),
        ((1, 4, 1), r"needs 4 devices, found 8"),
        ((-1, -1, 8), r"mesh data=-1 x fsdp=-1 x tensor=8: one axis may be -1"),
        ((-2, -4, 1), r"the others must be at least 1; set config.mesh.fsdp=-1"),
        ((0, -1, 1), r"the others must be at least 1"),
    ],
    ids=str,
)
def test_a_wrong_mesh_names_the_cure(axes: tuple[int, ...], message: str, devices: list[jax.Device]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_mesh(MeshConfig(*axes), devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"])
@pytest.mark.parametrize("axes", [(1, -1, 1), (2, -1, 1), (1, -1, 2), (2, 2, -1), (8, 1, 2), (1, 4, 4)], ids=str)
def test_on_every_slice_the_tensor_axis_stays_in_a_process(topology: str, axes: tuple[int, ...]) -> None:
    """Four machines; `jax.make_mesh` lays tensor=4 over two of them, and refuses tensor=2 on two of these slices."""
    mesh = make_mesh(MeshConfig(*axes), tpu_target(topology).devices)
    assert sorted(device.id for device in mesh.devices.flat) == list(range(16))
    for shard in mesh.devices.reshape(batch_shards(mesh), -1):
        assert len({device.process_index for device in shard}) == 1


def test_a_tensor_axis_larger_than_a_process_names_the_cure() -> None:
    with pytest.raises(ConfigError, match=r"tensor=8 does not divide the 4 devices of a process; set config.mesh.tens"):
        axis_sizes(MeshConfig(1, -1, 8), devices=16, processes=4)
