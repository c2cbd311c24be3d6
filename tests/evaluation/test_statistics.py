"""Intervals, pass@k and majorities, against what they are defined as."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.evaluation.statistics import Interval, bootstrap, majority, pass_at_k


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_pass_at_k_of_fractions_is_the_mean_of_the_best_of_every_draw(rows: list[list[float]], k: int) -> None:
    draws = [max(draw) for row in rows for draw in itertools.combinations(row, k)]
    assert pass_at_k(np.array(rows), k) == pytest.approx(np.mean(draws))


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 4))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(rows: list[list[bool]], k: int) -> None:
    draws = [any(draw) for row in rows for draw in itertools.combinations(row, k)]
    assert pass_at_k(np.array(rows), k) == pytest.approx(np.mean(draws))


def test_the_first_of_the_most_frequent_answers_is_the_majority() -> None:
    assert majority(["4", "5", " 5 ", "4"], [1, 0, 0, 1]) == 1
    assert majority(["five", "4", "Five"], [0, 1, 0]) == 0
    assert majority([None, None, "4"], [0, 0, 1]) == 1
    assert majority([None, None], [0, 0]) == 0


def test_an_interval_is_that_of_the_binomial_distribution() -> None:
    values = np.repeat([1.0, 0.0], [300, 100])
    found = bootstrap([values], seed=0)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found.mean == 0.75
    # 10,000 resamples know a percentile to about 0.0005; a step of the mean is 0.0025.
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.004)


def test_benchmarks_count_alike_whatever_their_size() -> None:
    small, large = np.ones(10), np.zeros(1000)
    assert bootstrap([small, large], seed=0) == Interval(0.5, 0.5, 0.5)


def test_an_interval_is_a_function_of_its_seed_and_covers_large_benchmarks() -> None:
    values = np.random.default_rng(1).integers(0, 2, 5000).astype(float)
    first = bootstrap([values], seed=3)
    assert first == bootstrap([values], seed=3) != bootstrap([values], seed=4)
    assert first.low < first.mean < first.high
