"""The order of a stream: which position of it is which task, and which process it belongs to. Arithmetic only.

Positions count the stream of all processes. A process has the same place in every block of `block` positions (a
global batch), so that the batches of all processes, side by side, are those of one.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from maestro_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Share:
    """The positions of one of `process_count` processes: those of its part of every block.

    Attributes:
      block: positions dealt out at a time, the global batch; a multiple of `process_count`.
    """

    block: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.block % self.process_count:
            raise ConfigError(
                f"batch_size must be at least 1 and a multiple of {self.process_count} processes, found {self.block}"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(f"process_index must be in 0..{self.process_count - 1}, found {self.process_index}")

    @property
    def part(self) -> int:
        """Positions of a block that are this process's."""
        return self.block // self.process_count

    def position(self, index: int) -> int:
        """The position of this process's task number `index`."""
        block, offset = divmod(index, self.part)
        return block * self.block + self.process_index * self.part + offset

    def count(self, end: int) -> int:
        """How many positions below `end` are this process's."""
        blocks, rest = divmod(end, self.block)
        return blocks * self.part + min(max(rest - self.process_index * self.part, 0), self.part)


@dataclasses.dataclass(frozen=True)
class Consumed:
    """Positions that are over: all below `position`, and those of `beyond`, which is sorted and starts above it."""

    position: int
    beyond: tuple[int, ...] = ()

    @classmethod
    def of(cls, position: int, beyond: Iterable[int]) -> "Consumed":
        """In the one form that a set of positions has."""
        left = sorted({p for p in beyond if p >= position}, reverse=True)
        while left and left[-1] == position:
            position += 1
            left.pop()
        return cls(position, tuple(reversed(left)))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a stream from those of all its processes, for any number of processes to go on with.

    They are taken behind the same number of batches. Without damaged rows all of them are equal, and any one will do.

    Raises:
      ConfigError: states of different streams.
    """
    first, *others = [{key: state[key] for key in state if key not in ("position", "beyond")} for state in states]
    if any(other != first for other in others):
        raise ConfigError("the saved data positions are of different streams; take those of the processes of one run")
    # What a process says is over is over, also of the others' positions: they have had as many batches.
    position = max(state["position"] for state in states)
    merged = Consumed.of(position, (p for state in states for p in state["beyond"]))
    return {"position": merged.position, "beyond": list(merged.beyond), **first}
