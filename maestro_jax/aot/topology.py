"""Devices to plan for: TPU slices that only their compiler knows, or those at hand.

A TPU topology ("v5e:8x8") comes from libtpu, which compiles for it on any machine. Its memory is what that
compiler says; peak rates are Google's (https://cloud.google.com/tpu/docs, pages "TPU v5e", "v5p", "v6e", "v4").
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maestro_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peaks of one chip."""

    flops: float  # bf16, per second
    memory: float  # bytes per second
    links: float  # bytes per second, all links of the interconnect together


# By `device_kind`.
_RATES = {
    "TPU v4": Rates(275e12, 1228e9, 300e9),
    "TPU v5 lite": Rates(197e12, 819e9, 200e9),
    "TPU v5": Rates(459e12, 2765e9, 600e9),
    "TPU v6 lite": Rates(918e12, 1640e9, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
      name: as the user spelled it, or the devices at hand.
      devices: none, where there is no compiler for them.
      limit: bytes a program and its data may take on one device; 0 if the backend does not tell.
      rates: None where they are not known.
    """

    name: str
    devices: tuple[jax.Device, ...]
    kind: str
    limit: int
    rates: Rates | None
    count: int

    @property
    def is_tpu(self) -> bool:
        return bool(self.devices) and self.devices[0].platform == "tpu"


def tpu_target(name: str) -> Target:
    """A slice such as "v5e:8x8", "v5p:2x2x2" or "v6e:4x4", without having one.

    Raises:
      ConfigError: libtpu is not installed, does not match this jax, or does not know the topology.
    """
    # Read when libtpu starts: it must not look for chips, nor warn that it has found none.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5e-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for variable, value in quiet.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        devices: tuple[jax.Device, ...] = tuple(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # the plugin raises whatever its C++ side does
        if "libtpu" in str(error) or "Unable to find" in str(error) or "not in the list" in str(error):
            raise ConfigError(
                f"the TPU compiler that goes with jax {jax.__version__} is not installed; "
                f"run `pip install 'jax[tpu]=={jax.__version__}'`, which needs no TPU"
            ) from error
        raise ConfigError(
            f"--topology {name!r} is not a slice the TPU compiler knows ({_first_line(error)}); "
            "use one such as v5e:8x8, v5p:2x2x2 or v6e:4x4"
        ) from error
    kind = devices[0].device_kind
    return Target(name, devices, kind, _compiler_limit(devices[0]), _RATES.get(kind), len(devices))


def present_target(devices: Sequence[jax.Device]) -> Target:
    """The devices of this process."""
    first = devices[0]
    statistics = first.memory_stats() or {}
    limit = statistics.get("bytes_limit", 0)
    if first.platform == "cpu":  # all of them share the machine's
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    kind = first.device_kind
    return Target(f"{len(devices)} x {kind}", tuple(devices), kind, limit, _RATES.get(kind), len(devices))


def _compiler_limit(device: jax.Device) -> int:
    """Bytes that the compiler lets a program use: asked by a program that needs too much."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    too_much = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        return refusal(str(error))[1]
    return 0


def refusal(message: str) -> tuple[int, int]:
    """Bytes needed and bytes available, as the TPU compiler writes them when it refuses a program; 0 if it does not."""
    available = re.search(r"(?:available HBM \(|of )([\d.]+)([KMGT])", message)
    needed = re.search(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])", message)
    return _bytes(needed), _bytes(available)


def _bytes(found: re.Match[str] | None) -> int:
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))) if found else 0


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
