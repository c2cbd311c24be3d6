"""Mixtures: several sources of tasks in, one source with exact shares out.

Which source stands at a position of the stream is arithmetic on whole numbers: no chance, no rounding that adds up.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from maestro_jax.data.source import ChainedSource, TaskSource
from maestro_jax.errors import ConfigError


class Mixture(ChainedSource):
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
        super().__init__(sources)
        self.weights = whole_weights(weights)


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
