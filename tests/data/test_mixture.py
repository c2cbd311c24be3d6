"""Which source stands where in a mixture, and mixtures as sources."""

import base64
import collections
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.data.jsonl import JsonlSource
from maestro_jax.data.mixture import Mixture, source_at, whole_weights
from maestro_jax.data.pipeline import Batches
from maestro_jax.data.source import ChainedSource
from maestro_jax.errors import ConfigError, DataError
from tests.data.listed import numbered


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**12))
def test_any_period_holds_each_source_by_its_weight_and_numbers_its_tasks(weights: list[int], period: int) -> None:
    total = sum(weights)
    drawn = [source_at(period * total + offset, weights) for offset in range(total)]
    assert collections.Counter(number for number, _ in drawn) == dict(enumerate(weights))
    for number, weight in enumerate(weights):
        own = [index for source, index in drawn if source == number]
        assert own == list(range(period * weight, (period + 1) * weight))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_shares_are_spread_evenly(weights: list[int]) -> None:
    """Of the first k positions, no source has one task more or less than its share but for those before it."""
    total, counts = sum(weights), [0] * len(weights)
    for k in range(1, 2 * total + 1):
        counts[source_at(k - 1, weights)[0]] += 1
        for number, weight in enumerate(weights):
            assert abs(counts[number] - k * weight / total) < len(weights)


@pytest.mark.parametrize(
    ("weights", "whole"),
    [((1,), (1,)), ((0.7, 0.3), (7, 3)), ((2, 2), (1, 1)), ((1.0, 1.004), (250, 251)), ((1e-3, 2), (1, 2000))],
)
def test_weights_count_as_they_are_printed(weights: tuple[float, ...], whole: tuple[int, ...]) -> None:
    assert whole_weights(weights) == whole


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_draws_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight of source 1 of the mixture is .*; use a number above 0"):
        whole_weights([1.0, weight])


def test_a_mixture_is_its_sources_one_after_the_other() -> None:
    first, second = numbered(2, "a"), numbered(3, "b")
    mixture = Mixture([first, second], [1, 5])
    assert [mixture[i] for i in range(len(mixture))] == [*first, *second]
    assert mixture.where(3) == "toy.parquet row 1"
    with pytest.raises(IndexError, match="task 5 of 5"):
        mixture[5]


def test_a_source_without_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="a weight a source, found 2 and 1"):
        Mixture([numbered(1), numbered(1)], [1])


def test_a_damaged_image_of_a_json_line_is_named_by_file_and_line(png: bytes, tmp_path: Path) -> None:
    """Sources within sources say where a row is, and lines that are blank count."""
    picture = base64.b64encode(png[:60]).decode()
    broken = {"question": "What?", "images": [{"bytes": picture}], "answers": ["1"], "source": "toy"}
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n\n" + json.dumps(broken) + "\n")
    mixture = Mixture([numbered(1), ChainedSource([JsonlSource(path)])], [1, 1])
    with pytest.raises(DataError, match=r"^\S*tasks.jsonl line 3: task .* image is damaged"):
        list(itertools.islice(Batches(mixture, 2, seed=0), 1))
