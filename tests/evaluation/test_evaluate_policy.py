"""Evaluation of a policy: what is counted, and that every task is run once."""

import dataclasses
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maestro_jax.evaluation.policy import Evaluation, evaluate_policy
from maestro_jax.rewards.reward import Scorer
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.trajectory import Stage, Trajectory
from maestro_jax.types import Call, Observation, Status, Task

TALLY, READER = Call("Tally", "Counting", "look"), Call("Reader", "Reading", "look")


def task(number: int, source: str) -> Task:
    return Task(f"{source}/{number}", "how many?", (), ("4",), source)


class Engine:
    """Plays prepared trajectories back and notes how it was asked."""

    def __init__(self, trajectories: Sequence[Trajectory]):
        self.by_task = {t.task.id: t for t in trajectories}
        self.asked: list[dict[str, Any]] = []

    def own_rows(self, groups: int) -> list[int]:
        return list(range(groups))

    def rollout(
        self, params: Any, tasks: Sequence[Task], groups: int, members: int, seed: int, step: int, greedy: bool, *_: Any
    ) -> Rollout:
        asked = {"members": members, "seed": seed, "greedy": greedy}
        self.asked.append({"tasks": [t.id for t in tasks], "groups": groups, **asked})
        shape = (groups, 1, 4)
        zeros = np.zeros(shape, np.int32)
        return Rollout(
            trajectories=[[self.by_task[t.id]] for t in tasks],
            prompts=SimpleNamespace(),  # type: ignore[arg-type]
            tokens=zeros,
            logprobs=zeros.astype(np.float32),
            authored=zeros > 0,
            length=zeros[..., 0],
        )


def trajectory(number: int, source: str, answer: str | None, calls: Sequence[tuple[Call, Status]]) -> Trajectory:
    made = [(call, Observation("4", status)) for call, status in calls]
    return Trajectory(task(number, source), 0, calls=made, answer=answer, stage=Stage.FINISHED)


TRAJECTORIES = [
    trajectory(0, "counting", "4", [(TALLY, Status.OK)]),
    trajectory(1, "counting", "5", [(TALLY, Status.OK), (READER, Status.OK)]),
    trajectory(2, "reading", None, [(READER, Status.OK)]),
    trajectory(3, "counting", "4", []),  # right, but by a guess: no call was made
    trajectory(4, "reading", "4", [(READER, Status.UNAVAILABLE), (READER, Status.OK)]),
]


def evaluate(engine: Engine, batch: int = 2, greedy: bool = True, ticks: list[int] | None = None) -> Evaluation:
    tasks = [t.task for t in TRAJECTORIES]
    tick = (ticks if ticks is not None else []).append
    return evaluate_policy(engine, None, tasks, batch, Scorer(), 3, greedy, tick)  # type: ignore[arg-type]


def test_averages_are_over_tasks() -> None:
    found = evaluate(Engine(TRAJECTORIES))
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.accuracy_by_domain == pytest.approx({"counting": 2 / 3, "reading": 1 / 2})
    assert found.reward == pytest.approx((1 + 0 - 1 + 0 + 1) / 5)
    assert found.format_kept == pytest.approx(3 / 5)
    assert found.calls == pytest.approx((1 + 2 + 1 + 0 + 1) / 5)


def test_routing_counts_every_call_by_domain() -> None:
    pairs = {("Tally", "Counting"): 2, ("Reader", "Reading"): 1}
    assert evaluate(Engine(TRAJECTORIES)).routing == {"counting": pairs, "reading": {("Reader", "Reading"): 3}}


@pytest.mark.parametrize(("batch", "sizes"), [(2, [2, 2, 1]), (8, [5])])
def test_every_task_runs_once_in_batches_of_one_size(batch: int, sizes: list[int]) -> None:
    engine, ticks = Engine(TRAJECTORIES), []
    whole = evaluate(engine, batch, ticks=ticks)
    assert [len(asked["tasks"]) for asked in engine.asked] == sizes
    assert [i for asked in engine.asked for i in asked["tasks"]] == [t.task.id for t in TRAJECTORIES]
    assert {asked["groups"] for asked in engine.asked} == {batch}  # static shapes: the last batch is padded
    assert ticks == np.cumsum(sizes).tolist()
    assert whole == evaluate(Engine(TRAJECTORIES))


@pytest.mark.parametrize("greedy", [True, False])
def test_one_episode_per_task_from_the_given_seed(greedy: bool) -> None:
    engine = Engine(TRAJECTORIES)
    evaluate(engine, greedy=greedy)
    assert all((a["members"], a["seed"], a["greedy"]) == (1, 3, greedy) for a in engine.asked)


def test_what_is_not_answered_counts_neither_as_right_nor_as_wrong() -> None:
    """It once counted as wrong, and nobody was told."""
    lost = dataclasses.replace(TRAJECTORIES[1], marked=True)
    found = evaluate(Engine([TRAJECTORIES[0], lost, *TRAJECTORIES[2:]]))
    assert (found.accuracy, found.missing) == (pytest.approx(3 / 4), 1)
    assert found.accuracy_by_domain == pytest.approx({"counting": 1.0, "reading": 1 / 2})
    assert found.routing["counting"] == {("Tally", "Counting"): 1}


class OneSilentJudge(Scorer):
    """Gives half of the outcome to task 1, and no verdict on task 0."""

    def __call__(self, episodes: Any) -> list[Any]:
        found = super().__call__(episodes)
        changes = {
            "counting/0": {"outcome": np.nan, "total": np.nan, "unjudged": "Referee"},
            "counting/1": {"outcome": 0.5},
        }
        return [dataclasses.replace(one, **changes.get(t.id, {})) for (t, _), one in zip(episodes, found, strict=True)]


def test_fractions_count_as_such_and_what_has_no_verdict_is_missing() -> None:
    tasks = [t.task for t in TRAJECTORIES]
    engine = Engine([dataclasses.replace(t, reward=None) for t in TRAJECTORIES])
    found = evaluate_policy(engine, None, tasks, 2, OneSilentJudge(), 3, True, print)  # type: ignore[arg-type]
    assert (found.accuracy, found.missing) == (pytest.approx((0.5 + 0 + 1 + 1) / 4), 1)
    assert found.accuracy_by_domain == pytest.approx({"counting": 0.75, "reading": 0.5})


def test_an_evaluation_survives_its_json_file() -> None:
    found = evaluate(Engine(TRAJECTORIES))
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
