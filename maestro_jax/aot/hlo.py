"""Reads a compiled program's text: which collectives it runs, how often, on how many bytes."""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(
    r"(?:calls|condition|body|to_apply|called_computation|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_CONDITION = re.compile(r" while\(.*condition=%([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      times: how often it runs, loops counted.
      shapes: of its results, as (dtype, dimensions); of a reduce-scatter, whose results are parts, of its operands.
    """

    kind: str
    times: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        """Of all `shapes`, each time."""
        return sum(self.bytes_by_dtype.values())

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Dtype as printed ("f32", "bf16") → its part of `bytes`."""
        found: dict[str, int] = defaultdict(int)
        for dtype, dimensions in self.shapes:
            found[dtype] += BYTES.get(dtype, 4) * math.prod(dimensions)
        return dict(found)


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised HLO module; loops of unknown length count once.

    The TPU compiler writes some reduce-scatters as a fusion of an all-reduce and a cut, named "all-reduce-scatter".
    """
    computations, entry = parse_computations(text)
    times = _times(computations, entry)
    found = []
    for name, lines in computations.items():
        if not times[name]:
            continue
        operations = [operation for operation in map(_OPERATION.match, lines) if operation]
        results = {operation[1]: operation[2] for operation in operations}
        for operation in operations:
            kind = operation[3].removesuffix("-start")
            if kind not in KINDS:
                continue
            shapes = _shapes(operation[2])
            if kind == "reduce-scatter":
                operands = _NAME.findall(operation[4].partition(")")[0])
                shapes = [shape for operand in operands for shape in _shapes(results[operand])]
            elif kind in ("all-gather", "collective-permute") and operation[3].endswith("-start"):
                arrays = [shape for shape in shapes if shape[1]]  # without the compiler's own counters
                shapes = arrays[len(arrays) // 2 :]  # operands stand before results
            elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            found.append(Collective(kind, times[name], tuple(shapes)))
    return found


def _shapes(printed: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _SHAPE.findall(printed)]


def parse_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the one that a call of the program runs."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            called = CALLED.findall(line)
            if not called:
                continue
            inner = count * trips(line, computations)
            for names in called:
                for each in names.split(", "):
                    visit(each.removeprefix("%"), inner)

    visit(entry, 1)
    return times


def trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often what an operation calls runs: a loop as often as it may, any other once.

    CPUs' and GPUs' compilers write beside a loop how often it runs, and may put the comparison into a fusion; that for
    TPUs leaves the comparison with a constant in the condition, as `jax.lax.scan` counts. An unknown length is 1.
    """
    condition = _CONDITION.search(line)
    if not condition:
        return 1
    if known := _KNOWN_TRIPS.search(line):
        return int(known[1])
    tested = computations.get(condition[1], [])
    bounds = [int(n) for each in tested for n in _BOUND.findall(each)]
    compares = any("direction=LT" in each for each in tested)
    return bounds[0] if len(bounds) == 1 and compares else 1
