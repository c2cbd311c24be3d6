"""The reward of an episode: R = outcome + format - cost_weight * price - latency_weight * seconds.

In: the task with its gold answers, and a summary of what the policy did. Out: every term, signed, and
their sum. Gold answers are read here and nowhere nearer to the experts.
"""

import dataclasses
from collections.abc import Sequence

from maestro_jax.rewards.graders import grade_all
from maestro_jax.types import Task

FORMAT_PENALTY = -1.0


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward.

    Attributes:
      require_call: an answer without any executed call breaks the format.
      cost_weight: reward per US dollar.
      latency_weight: reward per second spent in calls.
    """

    require_call: bool = True
    cost_weight: float = 0.0
    latency_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class EpisodeSummary:
    """What the reward needs to know of an episode.

    Attributes:
      answer: text of the one answer; None if the episode ended without.
      executed_calls: calls that ran (a malformed or unknown one did not).
      well_formed: every turn was (see `rollout.protocol.ParsedTurn.well_formed`).
      price: US dollars, summed over calls.
      seconds: seconds, summed over calls.
    """

    answer: str | None
    executed_calls: int
    well_formed: bool
    price: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class RewardParts:
    """Signed terms of the reward; `total` is their sum."""

    outcome: float  # 1 right, 0 wrong or none
    format: float  # 0 kept, -1 broken
    cost: float  # <= 0
    latency: float  # <= 0
    total: float


def score(task: Task, episode: EpisodeSummary, config: RewardConfig) -> RewardParts:
    """The reward of one episode on `task`.

    Raises:
      ConfigError: the task's source has no grader.
    """
    return score_all([(task, episode)], config)[0]


def score_all(episodes: Sequence[tuple[Task, EpisodeSummary]], config: RewardConfig) -> list[RewardParts]:
    """`score` for many episodes, whose answers are graded side by side."""
    verdicts = iter(grade_all([(task, e.answer) for task, e in episodes if e.answer is not None]))
    return [_parts(e.answer is not None and next(verdicts), e, config) for _, e in episodes]


def _parts(right: bool, episode: EpisodeSummary, config: RewardConfig) -> RewardParts:
    called = episode.executed_calls > 0 or not config.require_call
    outcome = 1.0 if right else 0.0
    format_term = 0.0 if episode.answer is not None and called and episode.well_formed else FORMAT_PENALTY
    cost = 0.0 - config.cost_weight * episode.price
    latency = 0.0 - config.latency_weight * episode.seconds
    return RewardParts(outcome, format_term, cost, latency, outcome + format_term + cost + latency)
