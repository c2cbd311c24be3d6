"""The reward's terms and their sum."""

import dataclasses
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.rewards.reward import EpisodeSummary, RewardConfig, RewardParts, Scorer
from maestro_jax.types import Task

TASK = Task("counting/train/0", "how many?", (), ("5",), "counting")
GOOD = EpisodeSummary(answer="5", executed_calls=1, well_formed=True, price=0.002, seconds=3.0)
PLAIN = RewardConfig()


def rate(config: RewardConfig = PLAIN, **changes: Any) -> RewardParts:
    return Scorer(config)([(TASK, dataclasses.replace(GOOD, **changes))])[0]


def test_a_right_answer_in_good_form() -> None:
    assert rate() == RewardParts(outcome=1.0, format=0.0, cost=0.0, latency=0.0, total=1.0)


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"answer": "6"}, 0.0),
        ({"answer": None}, -1.0),
        ({"answer": "6", "well_formed": False}, -1.0),
        ({"well_formed": False}, 0.0),
        ({"executed_calls": 0}, 0.0),
        ({"executed_calls": 4}, 1.0),
    ],
)
def test_outcome_and_format(changes: dict[str, Any], total: float) -> None:
    assert rate(**changes).total == total


def test_no_call_is_fine_where_none_is_required() -> None:
    assert rate(RewardConfig(require_call=False), executed_calls=0).format == 0.0


def test_cost_and_latency_are_signed_parts_of_the_total() -> None:
    parts = rate(RewardConfig(cost_weight=100.0, latency_weight=0.01))
    assert (parts.cost, parts.latency) == (pytest.approx(-0.2), pytest.approx(-0.03))
    assert parts.total == pytest.approx(0.77)


def test_a_source_without_grader_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no grader"):
        Scorer()([(dataclasses.replace(TASK, source="riddles"), GOOD)])
