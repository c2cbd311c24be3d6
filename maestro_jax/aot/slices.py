"""Accelerators as one asks for them ("v5litepod-64", "h100x8x2"): how many devices, on how many machines.

TPU: accelerator types of Cloud TPU (https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e). The number is of chips for
v5e and v6e, of cores, two a chip, for v5p; JAX sees a chip as one device. Slices of several machines have four chips on
each. GPUs: kind x GPUs of a machine x machines.
"""

import dataclasses
import re

from maestro_jax.errors import ConfigError

_CHIPS = 4  # of a machine, in a slice of several
# By the number of chips, as `plan --topology` spells them.
_FLAT = {16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
}
_CUBE = 64  # chips; larger v5p slices are of whole cubes, in more shapes than are listed
_ONE_MACHINE = {1: "", 4: "2x2", 8: "2x4"}  # the compiler knows no topology of one chip
_KNOWN = "v5litepod-64, v5p-128, v6e-256, or h100x8x2 (two machines with eight GPUs each)"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices that are had together.

    Attributes:
      platform: "tpu" or "gpu".
      devices: of each host, all of them in one process.
      topology: what `plan --topology` calls it; empty if it cannot plan for it.
    """

    name: str
    platform: str
    hosts: int
    devices: int
    topology: str


def parse_accelerator(name: str) -> Slice:
    """A slice by its name.

    Raises:
      ConfigError: there is none of this name.
    """
    if found := re.fullmatch(r"(a100|h100|h200)x(\d+)(?:x(\d+))?", name):
        per_host, hosts = int(found[2]), int(found[3] or 1)
        if per_host and hosts:
            return Slice(name, "gpu", hosts, per_host, f"{found[1]}:{hosts * per_host}")
    if found := re.fullmatch(r"(v5litepod|v6e|v5p)-(\d+)", name):
        return _tpu_slice(name, found[1], int(found[2]))
    raise ConfigError(f"--accelerator {name!r} is unknown; use one such as {_KNOWN}")


def _tpu_slice(name: str, kind: str, number: int) -> Slice:
    if kind == "v5p":
        chips = number // 2
        if not chips or number % 2 or (chips not in _CUBES and chips % _CUBE):
            sizes = ", ".join(f"v5p-{2 * chips}" for chips in _CUBES if chips <= _CUBE)
            raise ConfigError(
                f"--accelerator {name!r} is no slice; use one of {sizes} or a multiple of {2 * _CUBE} "
                "(the number is of cores, two a chip)"
            )
        shape = _CUBES.get(chips)
        return Slice(name, "tpu", chips // _CHIPS, _CHIPS, f"v5p:{shape}" if shape else "")
    generation = "v5e" if kind == "v5litepod" else kind
    shape = {**_ONE_MACHINE, **_FLAT}.get(number)
    if shape is None:
        sizes = ", ".join(f"{kind}-{chips}" for chips in (*_ONE_MACHINE, *_FLAT))
        raise ConfigError(f"--accelerator {name!r} is no slice; use one of {sizes}")
    hosts = 1 if number in _ONE_MACHINE else number // _CHIPS
    return Slice(name, "tpu", hosts, number // hosts, f"{generation}:{shape}" if shape else "")
