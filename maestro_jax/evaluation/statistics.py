"""Statistics of graded episodes: numpy arrays of outcomes in, shares in 0..1 out."""

import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
_AT_A_TIME = 4_000_000  # numbers drawn at once: 32 MB


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(groups: Sequence[np.ndarray], seed: int) -> Interval:
    """The average over groups of each group's mean (Efron 1979: percentiles of means of resampled tasks).

    Args:
      groups: a benchmark each: float `[tasks]`, what each task counts. Tasks are resampled within their group.
    """
    random = np.random.default_rng(seed)
    means = np.mean([_resampled_means(values, random) for values in groups], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean([values.mean() for values in groups])), float(low), float(high))


def _resampled_means(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """float `[RESAMPLES]`."""
    rows = max(1, _AT_A_TIME // len(values))
    parts = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([values[random.integers(len(values), size=(n, len(values)))].mean(axis=1) for n in parts])


def pass_at_k(outcomes: np.ndarray, k: int) -> float:
    """Mean outcome of the best of k samples, without bias.

    Where outcomes are 0 or 1, it is the share of tasks that k samples solve at least once (Chen et al. 2021, arXiv
    2107.03374, section 2.1).

    Args:
      outcomes: float `[tasks, samples]`; k is at most the number of samples.
    """
    samples = outcomes.shape[1]
    # Of all draws of k, comb(i, k - 1) have the i-th smallest as their best.
    ways = math.comb(samples, k)
    best = np.array([math.comb(i, k - 1) / ways for i in range(samples)])
    return float(np.mean(np.sort(outcomes.astype(float), axis=1) @ best))


def majority(answers: Sequence[str | None], outcomes: Sequence[float]) -> float:
    """Outcome of the answer that most samples of a task give; of several, the one given first.

    Answers count as equal when they are but for case and spaces. None is no vote; without any vote it is wrong.
    """
    votes = [None if answer is None else " ".join(answer.casefold().split()) for answer in answers]
    counts = collections.Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    return outcomes[votes.index(counts.most_common(1)[0][0])]
