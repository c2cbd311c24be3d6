"""Meshes of eight fake devices, and the errors of wrong ones."""

import jax
import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, batch_shards, make_mesh


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
