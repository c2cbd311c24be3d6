"""Reads a compiled TPU program's text: how many bytes it moves between the memory of a chip and its cores.

Each operation reads its operands and writes its results, with their padding. What lies in the cores' own memory (S(n)
in a layout) costs nothing. Of an operand that is cut or looked up in, only what is taken counts; of one that is changed
in place, only the change; of a conditional, the larger branch.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from maestro_jax.aot.hlo import BYTES, CALLED, parse_computations, trips

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?")
_PARTS = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_IN_A_CORE = re.compile(r"S\(\d+\)")
_NAME = re.compile(r"%([\w.\-]+)")

_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id")
_CUTS = ("slice", "dynamic-slice", "gather")
_CHANGES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the change to operand 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    root: bool
    results: tuple[str, ...]  # arrays as printed, with layouts
    kind: str
    operands: tuple[str, ...]  # names
    index: str  # of a parameter
    called: tuple[str, ...]
    line: str  # as printed

    @classmethod
    def parse(cls, line: str) -> "Instruction | None":
        found = _INSTRUCTION.match(line)
        if not found:
            return None
        root, name, shape, kind, rest = found.groups()
        inside, _, attributes = rest.partition(")")
        called = [each.removeprefix("%") for names in CALLED.findall(attributes) for each in names.split(", ")]
        return cls(
            name=name,
            root=bool(root),
            results=tuple(_ARRAY.findall(shape)),
            kind=kind,
            operands=tuple(_NAME.findall(inside)),
            index=inside.strip(),
            called=tuple(called),
            line=line,
        )


def moved(text: str) -> int:
    """Bytes that an optimised HLO module moves; loops run as often as they may, those of unknown length once."""
    module = _Module(text)
    return module.moved(module.entry)


class _Module:
    def __init__(self, text: str):
        self.lines, self.entry = parse_computations(text)
        self.instructions = functools.cache(self._instructions)

    def _instructions(self, computation: str) -> dict[str, Instruction]:
        parsed = (Instruction.parse(line) for line in self.lines[computation])
        return {each.name: each for each in parsed if each}

    def moved(self, computation: str) -> int:
        return sum(self._moved_by(each, computation) for each in self.instructions(computation).values())

    def _moved_by(self, each: Instruction, computation: str) -> int:
        among = self.instructions(computation)
        kind = each.kind.removesuffix("-start")
        if kind in _FREE or kind.endswith("-done"):
            return 0
        if kind == "while":
            return trips(each.line, self.lines) * sum(map(self.moved, each.called))
        if kind in ("conditional", "call"):
            return max(self.moved(name) for name in each.called)
        results, operands = _results(each, among), [among[name].results for name in each.operands]
        written = _bytes(results)
        if kind == "fusion":
            (fused,) = each.called
            read = sum(min(_bytes(arrays), self._read(fused, str(i))) for i, arrays in enumerate(operands))
            return read + min(written, self._written(fused))
        if kind in _CUTS:
            return written + _bytes(results, anywhere=True)
        if kind in _CHANGES:
            change = operands[_CHANGES[kind]]
            return _bytes(change) + min(written, _bytes(change, anywhere=True))
        return written + sum(map(_bytes, operands))

    def _read(self, fused: str, index: str) -> int:
        """Bytes that a fused computation takes of its parameter with this number."""
        among = self.instructions(fused).values()
        (parameter,) = (each for each in among if each.kind == "parameter" and each.index == index)
        return min(self._taken(fused, parameter), _bytes(parameter.results, anywhere=True))

    def _taken(self, fused: str, value: Instruction) -> int:
        if value.root:
            return _bytes(value.results, anywhere=True)
        users = [each for each in self.instructions(fused).values() if value.name in each.operands]
        return sum(self._taken_by(fused, value, user) for user in users)

    def _taken_by(self, fused: str, value: Instruction, user: Instruction) -> int:
        at = user.operands.index(value.name)
        if user.kind == "bitcast" or (user.kind == "fusion" and self._renames(user.called[0])):
            return self._taken(fused, user)
        if user.kind == "fusion":
            return self._read(user.called[0], str(at))
        if user.kind in _CUTS and at == 0:
            return _bytes(user.results, anywhere=True)
        return 0 if user.kind in _CHANGES and at == 0 else _bytes(value.results, anywhere=True)

    def _renames(self, fused: str) -> bool:
        return all(each.kind in ("parameter", "bitcast") for each in self.instructions(fused).values())

    def _written(self, fused: str) -> int:
        """Bytes that a fused computation writes, wherever to."""
        among = self.instructions(fused)

        def of(each: Instruction) -> int:
            if each.kind in ("bitcast", "tuple"):
                return sum(of(among[name]) for name in each.operands)
            if each.kind in _CHANGES:
                return _bytes(among[each.operands[_CHANGES[each.kind]]].results, anywhere=True)
            return self._written(each.called[0]) if each.kind == "fusion" else _bytes(each.results, anywhere=True)

        return sum(of(each) for each in among.values() if each.root)


def _results(each: Instruction, among: dict[str, Instruction]) -> tuple[str, ...]:
    """What an operation yields; one that is only started prints its operands and flags among its results."""
    if not each.kind.endswith("-start"):
        return each.results
    given = [array for name in each.operands for array in among[name].results]
    return tuple(array for array in each.results if array not in given and "[]" not in array)


def _bytes(arrays: Sequence[str], anywhere: bool = False) -> int:
    """Of arrays in the chip's memory; `anywhere` counts those in the cores' own memory, too."""
    return sum(_padded(array) for array in arrays if anywhere or not _IN_A_CORE.search(array))


def _padded(array: str) -> int:
    """Bytes that an array takes, its innermost dimensions filled up to whole tiles."""
    found = _PARTS.match(array)
    assert found
    dtype, sizes, order, layout = found.groups()
    shape = [int(n) for n in sizes.split(",") if n]
    if order:
        shape = [shape[int(i)] for i in reversed(order.split(","))]
    if tile := _TILE.search(layout or ""):
        for i, n in enumerate(reversed(tile[1].split(",")[-len(shape) :] if shape else []), start=1):
            shape[-i] = math.ceil(shape[-i] / int(n)) * int(n)
    return BYTES.get(dtype, 4) * math.prod(shape)
