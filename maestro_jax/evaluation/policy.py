"""Runs a policy on a list of tasks and counts what it did."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from maestro_jax import failpoints
from maestro_jax.evaluation.episodes import Episode, Routing, answered, by_source, marks_of, routing_of, run_episodes
from maestro_jax.rewards.reward import Scorer
from maestro_jax.rollout.engine import Engine
from maestro_jax.rollout.outages import Outages
from maestro_jax.types import Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Averages over the tasks that were answered; accuracy is the mean outcome (0 to 1)."""

    accuracy: float
    accuracy_by_domain: dict[str, float]
    reward: float
    format_kept: float  # share of episodes without a format penalty
    calls: float  # executed calls per episode
    routing: Routing  # domain → pair → calls
    missing: int = 0  # tasks without a result, since an expert failed whenever it was asked

    def to_json(self) -> dict[str, Any]:
        routing = {d: [[*pair, n] for pair, n in pairs.items()] for d, pairs in self.routing.items()}
        return dataclasses.asdict(self) | {"routing": routing}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Evaluation":
        routing = {d: {(e, s): n for e, s, n in rows} for d, rows in values["routing"].items()}
        return cls(**(values | {"routing": routing}))


def evaluate_policy(
    engine: Engine,
    params: nnx.State,
    tasks: Sequence[Task],
    batch: int,
    reward: Scorer,
    seed: int,
    greedy: bool,
    tick: Callable[[int], None],
    outages: Outages | None = None,
) -> Evaluation:
    """One episode per task, `batch` at a time; `tick` hears how many tasks are done.

    Raises:
      Preempted: too many tasks are left without a result (`Outages.check`).
    """
    made: list[Episode] = []
    for start in range(0, len(tasks), batch):
        made += run_episodes(engine, params, tasks[start : start + batch], batch, 1, reward, seed, greedy, outages)
        tick(len(made))
        failpoints.reach("in_evaluation")
    if outages is not None:
        outages.check(marks_of(made), "held-out episodes")
    episodes = answered(made)
    sources = by_source(episodes)
    return Evaluation(
        accuracy=float(np.mean([e.outcome for e in episodes])),
        accuracy_by_domain={source: float(np.mean([e.outcome for e in own])) for source, own in sources.items()},
        reward=float(np.mean([e.reward for e in episodes])),
        format_kept=float(np.mean([e.kept_format for e in episodes])),
        calls=float(np.mean([e.executed_calls for e in episodes])),
        routing=routing_of(episodes),
        missing=len(made) - len(episodes),
    )
