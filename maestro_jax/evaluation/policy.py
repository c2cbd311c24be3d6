"""Runs a policy on a list of tasks and counts what it did."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from maestro_jax import failpoints
from maestro_jax.evaluation.episodes import Episode, Routing, by_source, routing_of, run_episodes
from maestro_jax.rewards.reward import RewardConfig
from maestro_jax.rollout.engine import Engine
from maestro_jax.types import Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Averages over tasks; accuracy is the mean outcome (0 to 1)."""

    accuracy: float
    accuracy_by_domain: dict[str, float]
    reward: float
    format_kept: float  # share of episodes without a format penalty
    calls: float  # executed calls per episode
    routing: Routing  # domain → pair → calls

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
    reward: RewardConfig,
    seed: int,
    greedy: bool,
    tick: Callable[[int], None],
) -> Evaluation:
    """One episode per task, `batch` at a time; `tick` hears how many tasks are done."""
    episodes: list[Episode] = []
    for start in range(0, len(tasks), batch):
        episodes += run_episodes(engine, params, tasks[start : start + batch], batch, 1, reward, seed, greedy)
        tick(len(episodes))
        failpoints.reach("in_evaluation")
    sources = by_source(episodes)
    return Evaluation(
        accuracy=float(np.mean([e.outcome for e in episodes])),
        accuracy_by_domain={source: float(np.mean([e.outcome for e in own])) for source, own in sources.items()},
        reward=float(np.mean([e.reward for e in episodes])),
        format_kept=float(np.mean([e.kept_format for e in episodes])),
        calls=float(np.mean([e.executed_calls for e in episodes])),
        routing=routing_of(episodes),
    )
