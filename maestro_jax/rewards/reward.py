"""The reward of an episode: R = outcome + format - cost_weight * price - latency_weight * seconds + own terms.

In: the task with its gold answers, and a summary of what the policy did. Out: every term, signed, and
their sum. Gold answers are read here, and told to a judge where one grades; they get nowhere nearer to the experts.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.rewards.graders import BUILT_IN, Answer, Graders, Judges
from maestro_jax.rewards.own import Own
from maestro_jax.types import Call, Observation, Task

FORMAT_PENALTY = -1.0


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward.

    Attributes:
      require_call: an answer without any executed call breaks the format.
      cost_weight: reward per US dollar.
      latency_weight: reward per second spent in calls.
      terms: further ones: name → {"term": "package.module:name", "weight": number}, of `(task, EpisodeSummary) ->
        float`. What it gives times its weight is added.
    """

    require_call: bool = True
    cost_weight: float = 0.0
    latency_weight: float = 0.0
    terms: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the policy wrote in a turn; `tokens` is their number."""

    text: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class EpisodeSummary:
    """What the reward needs to know of an episode.

    Attributes:
      answer: text of the one answer; None if the episode ended without.
      executed_calls: calls that ran (a malformed or unknown one did not).
      well_formed: every turn was (see `rollout.protocol.ParsedTurn.well_formed`).
      price: US dollars, summed over calls.
      seconds: seconds, summed over calls.
      calls: those that were sent, with what came back: foreign text.
      turns: what the policy wrote, turn by turn; only where the run has terms of its own.
      asker: tells the episode from all others of its part of the run, the same in every run.
    """

    answer: str | None
    executed_calls: int
    well_formed: bool
    price: float
    seconds: float
    calls: tuple[tuple[Call, Observation], ...] = ()
    turns: tuple[Turn, ...] = ()
    asker: str = ""


@dataclasses.dataclass(frozen=True)
class RewardParts:
    """Signed terms of the reward; `total` is their sum. Outcome and total are NaN where a judge gave no verdict.

    Attributes:
      terms: the run's own, weighted.
      unjudged: the expert that gave no verdict; the episode then counts nowhere.
    """

    outcome: float  # 1 right, 0 wrong or none, or between
    format: float  # 0 kept, -1 broken
    cost: float  # <= 0
    latency: float  # <= 0
    total: float
    terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unjudged: str = ""


class Scorer:
    """Scores episodes; made once for a run.

    Args:
      graders: of the run.
      judges: of the run, if it has any.
      decode: token ids → text, for what terms are shown of the turns.

    Raises:
      ConfigError: a term is wrong.
    """

    def __init__(
        self,
        config: RewardConfig = RewardConfig(),
        graders: Graders = BUILT_IN,
        judges: Judges | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ):
        self.graders, self._judges = graders, judges
        self.decode = decode if config.terms else None
        self._config = config
        self._terms = {name: _read_term(name, value) for name, value in config.terms.items()}

    def outcomes(self, answers: Sequence[Answer], episodes: int = 0) -> list[float]:
        """How right each answer is (`Graders.outcomes`)."""
        return self.graders.outcomes(answers, self._judges, episodes)

    def check(self, unjudged: Sequence[str]) -> None:
        """Refuses a step too many of whose episodes have no verdict; of several processes all call it.

        Args:
          unjudged: of each episode (`RewardParts.unjudged`).

        Raises:
          UserError: so it is.
        """
        if self.graders.has_judges and self._judges is not None:
            self._judges.check(unjudged)

    def __call__(self, episodes: Sequence[tuple[Task, EpisodeSummary]]) -> list[RewardParts]:
        """The reward of each episode; answers are graded side by side.

        Raises:
          ConfigError: a task has no grader, or a grader or a term of the user's fails.
        """
        answers = [Answer(t, e.answer, e.asker) for t, e in episodes if e.answer is not None]
        outcomes = iter(self.outcomes(answers, len(episodes)))
        return [self._parts(t, e, 0.0 if e.answer is None else next(outcomes)) for t, e in episodes]

    def _parts(self, task: Task, episode: EpisodeSummary, outcome: float) -> RewardParts:
        config = self._config
        called = episode.executed_calls > 0 or not config.require_call
        format_term = 0.0 if episode.answer is not None and called and episode.well_formed else FORMAT_PENALTY
        cost = 0.0 - config.cost_weight * episode.price
        latency = 0.0 - config.latency_weight * episode.seconds
        terms = {
            name: weight * term.number(task, episode, -math.inf, math.inf, "a finite number")
            for name, (term, weight) in self._terms.items()
        }
        total = outcome + format_term + cost + latency + sum(terms.values())
        unjudged = self.graders.judge_of(task) if math.isnan(outcome) else ""
        return RewardParts(outcome, format_term, cost, latency, total, terms, unjudged)


def _read_term(name: str, value: Any) -> tuple[Own, float]:
    where = f"config.reward.terms.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f'{where}: metrics have the name "reward/{name}"; use letters, digits, "_" and "-"')
    if not isinstance(value, Mapping) or value.keys() != {"term", "weight"} or not isinstance(value["term"], str):
        raise ConfigError(f'{where} must be {{"term": "package.module:name", "weight": number}}, found {value!r:.80}')
    weight = value["weight"]
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise ConfigError(f"{where}.weight must be a finite number, found {weight!r:.60}")
    return Own(where, value["term"]), float(weight)
