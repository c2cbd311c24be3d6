"""Names of accelerators, against what the TPU compiler says of the same slice."""

import pytest

from maestro_jax.aot.slices import Slice, parse_accelerator
from maestro_jax.aot.topology import tpu_target
from maestro_jax.errors import ConfigError


@pytest.mark.parametrize("name", ["v5litepod-16", "v5litepod-128", "v5p-16", "v5p-256", "v6e-4", "v6e-64"])
def test_hosts_and_devices_are_those_of_the_compiler(name: str) -> None:
    found = parse_accelerator(name)
    devices = tpu_target(found.topology).devices
    assert len(devices) == found.hosts * found.devices
    assert len({device.process_index for device in devices}) == found.hosts


def test_eight_chips_of_v5e_and_v6e_are_one_machine() -> None:
    assert parse_accelerator("v5litepod-8") == Slice("v5litepod-8", "tpu", 1, 8, "v5e:2x4")
    assert parse_accelerator("v6e-8") == Slice("v6e-8", "tpu", 1, 8, "v6e:2x4")
    assert parse_accelerator("v5litepod-1") == Slice("v5litepod-1", "tpu", 1, 1, "")


def test_cores_of_v5p_are_two_a_chip() -> None:
    assert parse_accelerator("v5p-8") == Slice("v5p-8", "tpu", 1, 4, "v5p:2x2x1")
    assert parse_accelerator("v5p-384") == Slice("v5p-384", "tpu", 48, 4, "")  # 4x4x12: three cubes


def test_gpus() -> None:
    assert parse_accelerator("h100x8x2") == Slice("h100x8x2", "gpu", 2, 8, "h100:16")
    assert parse_accelerator("h200x1") == Slice("h200x1", "gpu", 1, 1, "h200:1")


@pytest.mark.parametrize("name", ["v5litepod-12", "v5p-12", "v5p-4", "v5p-0", "v6e-512", "h100x0", "h100", "v9-8", ""])
def test_what_cannot_be_had_is_refused_with_names_that_can(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--accelerator .*; use one (of|such as) .*-(8|16|64)"):
        parse_accelerator(name)
