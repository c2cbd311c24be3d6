"""Runs a policy on a list of tasks and counts what it did."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from maestro_jax.grpo.batch import score_rollout
from maestro_jax.rewards.reward import RewardConfig
from maestro_jax.rollout.engine import Engine
from maestro_jax.types import Task

Routing = dict[str, dict[tuple[str, str], int]]


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
    outcomes: dict[str, list[float]] = collections.defaultdict(list)
    routing: Routing = {}
    rewards, kept, calls = [], [], []
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        rollout = engine.rollout(params, part, batch, members=1, seed=seed, step=0, greedy=greedy)
        scored = score_rollout(rollout, reward)
        for group, parts in zip(rollout.trajectories, scored.parts, strict=True):
            trajectory, result = group[0], parts[0]
            source = trajectory.task.source
            outcomes[source].append(result.outcome)
            rewards.append(result.total)
            kept.append(result.format == 0.0)
            calls.append(trajectory.executed_calls)
            counts = routing.setdefault(source, {})
            for call, _ in trajectory.calls:
                counts[call.expert, call.skill] = counts.get((call.expert, call.skill), 0) + 1
        tick(start + len(part))
    return Evaluation(
        accuracy=float(np.mean([x for values in outcomes.values() for x in values])),
        accuracy_by_domain={source: float(np.mean(values)) for source, values in sorted(outcomes.items())},
        reward=float(np.mean(rewards)),
        format_kept=float(np.mean(kept)),
        calls=float(np.mean(calls)),
        routing=routing,
    )
