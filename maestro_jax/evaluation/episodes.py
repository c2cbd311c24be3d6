"""Graded episodes: what a policy did on held-out tasks, one record each, in batches of a static size."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from maestro_jax.grpo.batch import score_rollout
from maestro_jax.parallel import cluster
from maestro_jax.rewards.reward import RewardParts, Scorer
from maestro_jax.rollout.engine import Engine
from maestro_jax.rollout.outages import Marks, Outages
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.types import Status, Task

Routing = dict[str, dict[tuple[str, str], int]]  # source → pair → calls


@dataclasses.dataclass(frozen=True)
class MadeCall:
    """A call of an episode and how it ended; price in US dollars."""

    expert: str
    skill: str
    status: str
    seconds: float
    price: float


@dataclasses.dataclass(frozen=True)
class Episode:
    """One graded episode.

    Attributes:
      task, source: of the task.
      sample: number among the sampled episodes of the task; 0 where decoding is greedy.
      answer: None if it ended without one.
      outcome: 1 right, 0 wrong, or between.
      kept_format: whether it has no format penalty.
      marked: whether an infrastructure failure got in its way; outcome and reward then say nothing.
      unjudged: the expert that gave no verdict on its answer.
      executed_calls: calls that ran; `calls` has the others as well.
      written, told: tokens of the policy, and of what it was told.
      seconds: from submission to its end, waiting for a lane included.
      malformed, unresolved, cut: turns without a well-formed call or an answer, calls of unknown names, turns that the
        token budget ended.
    """

    task: str
    source: str
    sample: int
    answer: str | None
    outcome: float
    reward: float
    kept_format: bool
    marked: bool
    executed_calls: int
    calls: tuple[MadeCall, ...]
    written: int
    told: int
    price: float
    seconds: float
    malformed: int
    unresolved: int
    cut: int
    unjudged: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Episode":
        """Raises TypeError or KeyError for what `to_json` has not made."""
        return cls(**(values | {"calls": tuple(MadeCall(**call) for call in values["calls"])}))


def run_episodes(
    engine: Engine,
    params: nnx.State,
    tasks: Sequence[Task],
    batch: int,
    members: int,
    reward: Scorer,
    seed: int,
    greedy: bool,
    outages: Outages | None = None,
) -> list[Episode]:
    """`members` graded episodes of each of at most `batch` tasks; shapes are those of a whole batch.

    Every process runs and grades its own, and gets all, in the order of the tasks.

    Args:
      outages: has marked episodes run again; those that stay marked are without a result.
    """
    step = 0 if greedy else 1  # part of what randomness is keyed by, and of who asks in the journal
    rollout = engine.rollout(params, tasks, batch, members, seed, step, greedy, outages)
    scored = score_rollout(rollout, reward)
    own = [
        (row, [graded(t, parts).to_json() for t, parts in zip(group, found, strict=True)])
        for row, group, found in zip(engine.own_rows(batch), rollout.trajectories, scored.parts, strict=False)
    ]
    told = sorted((group for process in cluster.gather(own) for group in process), key=lambda group: group[0])
    return [Episode.from_json(episode) for _, group in told for episode in group]


def graded(trajectory: Trajectory, parts: RewardParts) -> Episode:
    """The record of a trajectory that is over."""
    written = sum(trajectory.authored)
    return Episode(
        task=trajectory.task.id,
        source=trajectory.task.source,
        sample=trajectory.member,
        answer=trajectory.answer,
        outcome=0.0 if parts.unjudged else parts.outcome,
        reward=0.0 if parts.unjudged else parts.total,
        kept_format=parts.format == 0.0,
        marked=trajectory.marked or bool(parts.unjudged),
        unjudged=parts.unjudged,
        executed_calls=trajectory.executed_calls,
        calls=tuple(
            MadeCall(call.expert, call.skill, seen.status.name, seen.seconds, seen.usage.price)
            for call, seen in trajectory.calls
        ),
        written=written,
        told=len(trajectory.authored) - written,
        price=trajectory.price,
        seconds=trajectory.seconds,
        malformed=trajectory.malformed,
        unresolved=trajectory.unresolved,
        cut=trajectory.cut,
    )


def answered(episodes: Sequence[Episode]) -> list[Episode]:
    """Those with a result: no expert's failure got in their way."""
    return [episode for episode in episodes if not episode.marked]


def marks_of(episodes: Sequence[Episode]) -> Marks:
    # A verdict that is still missing does not come by waiting (`Judging.check`).
    judges = [[(e.unjudged, Status.CONFIG_ERROR)] if e.unjudged else [] for e in episodes]
    calls = [[(call.expert, Status[call.status]) for call in e.calls] for e in episodes]
    return Marks.of((e.marked, [*c, *j]) for e, c, j in zip(episodes, calls, judges, strict=True))


def by_source(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each source, sources in alphabetical order."""
    found: dict[str, list[Episode]] = collections.defaultdict(list)
    for episode in episodes:
        found[episode.source].append(episode)
    return dict(sorted(found.items()))


def routing_of(episodes: Sequence[Episode]) -> Routing:
    """How often each pair was called, by source."""
    routing: Routing = {}
    for episode in episodes:
        counts = routing.setdefault(episode.source, {})
        for call in episode.calls:
            counts[call.expert, call.skill] = counts.get((call.expert, call.skill), 0) + 1
    return routing
