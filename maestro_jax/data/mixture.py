"""Mixtures: several sources of tasks in, one source with exact shares out.

Which source stands at a position of the stream is arithmetic on whole numbers: no chance, no rounding that adds up.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from maestro_jax.data.source import TaskSource
from maestro_jax.errors import ConfigError
from maestro_jax.types import Task


class Mixture:
    """Sources with the shares in which a stream draws from them; by number, all their tasks one after the other.

    Args:
      sources: at least one.
      weights: shares, above 0; they need not add up to 1. A weight counts as it is printed: 0.1 is a tenth.

    Raises:
      ConfigError: no source, or a weight that is not above 0.
    """

    def __init__(self, sources: Sequence[TaskSource], weights: Sequence[float]):
        if not sources or len(sources) != len(weights):
            raise ConfigError(f"a mixture needs a weight a source, found {len(sources)} and {len(weights)}")
        self.sources = tuple(sources)
        self.weights = whole_weights(weights)
        self._starts = np.cumsum([0, *[len(source) for source in sources]])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Task:
        return self.sources[self._number(index)][self._row(index)]

    def where(self, index: int) -> str:
        return self.sources[self._number(index)].where(self._row(index))

    def _number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _row(self, index: int) -> int:
        return index - int(self._starts[self._number(index)])


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion: 0.7 and 0.3 are 7 and 3.

    Raises:
      ConfigError: a weight that is not a number above 0.
    """
    for number, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"the weight of source {number} of the mixture is {weight}; use a number above 0")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    whole = [int(part * scale) for part in exact]
    common = math.gcd(*whole)
    return tuple(part // common for part in whole)


def source_at(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which source stands at a position of the stream, and how many tasks of it stand before.

    Of any sum(weights) positions in a row from a multiple of it, source i has weights[i], spread evenly.
    """
    # Each source takes its share of what those before it leave over. Of the first k positions it has the difference of
    # two floors, so a position belongs to the source whose number of tasks grows with it.
    before, after, left = position, position + 1, sum(weights)
    for number, weight in enumerate(weights[:-1]):
        rest_before, rest_after = before * (left - weight) // left, after * (left - weight) // left
        if before - rest_before != after - rest_after:
            return number, before - rest_before
        before, after, left = rest_before, rest_after, left - weight
    return len(weights) - 1, before
