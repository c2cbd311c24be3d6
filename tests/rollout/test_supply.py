"""Groups of every step: in rollouts while others run, or ahead of their step; none is dropped or comes twice."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.prompts import PreparedTask, Prompts
from maestro_jax.policy.tokens import Tokens
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.outages import OutageConfig, Outages
from maestro_jax.rollout.supply import Supply, SupplyConfig
from maestro_jax.types import Call, Observation, Status
from tests.rollout import toy
from tests.rollout.test_engine import Experts, Runner, assert_same_arrays, bigram_runner, one_device

GROUPS, MEMBERS = 2, 4


class SlowForSome(Experts):
    """Answers at once but for tasks of one number, for which it takes `delay` seconds."""

    def __init__(self, delay: float, slow: str):
        super().__init__(0.0, seed=0)
        self.seconds, self.slow = delay, slow
        self.out = ""  # questions that have this in them are not answered

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        await asyncio.sleep(self.seconds if self.slow in question else 0.0)
        if self.out and self.out in question:
            return Observation("gone", Status.UNAVAILABLE)
        return Observation(f"{question[:-1]} {call.expert}", Status.OK)


class Numbered:
    """Batches of tasks 0, 1, 2, ..., without end."""

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.position = 0

    def __next__(self) -> list[PreparedTask]:
        self.position += GROUPS
        return [self.prompts.prepare(toy.task(n)) for n in range(self.position - GROUPS, self.position)]

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position, "beyond": []}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@pytest.fixture(scope="module")
def experts() -> SlowForSome:
    return SlowForSome(0.3, "many 1?")


@pytest.fixture(scope="module")
def runner(toy_tokens: Tokens, experts: SlowForSome) -> Iterator[Runner]:
    made = bigram_runner(toy_tokens, one_device(), experts)
    yield made
    made.dispatcher.close()


def supply(
    runner: Runner, rollouts: int = 1, ahead: int = 0, staleness: int = 0, outages: Outages | None = None
) -> Supply:
    batches = Numbered(runner.engine.prompts)
    return Supply(runner.engine, batches, SupplyConfig(GROUPS, MEMBERS, rollouts, ahead, staleness), 0, outages)


def ids(rollout: Rollout) -> list[str]:
    return [group[0].task.id for group in rollout.trajectories]


def joined(parts: list[Rollout]) -> Rollout:
    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    trajectories = [group for part in parts for group in part.trajectories]
    arrays = {name: join(name) for name in ("tokens", "logprobs", "authored", "length")}
    return Rollout(trajectories, parts[0].prompts, **arrays)


def test_on_policy_a_step_is_a_rollout_of_its_tasks(runner: Runner) -> None:
    (found,) = supply(runner).step(runner.params, step=1)
    tasks = [toy.task(0), toy.task(1)]
    wanted = runner.engine.rollout(runner.params, tasks, GROUPS, MEMBERS, seed=0, step=1, greedy=False)
    assert_same_arrays(found, wanted)


def test_parts_come_in_the_order_of_tasks_while_others_wait(runner: Runner) -> None:
    (wanted,) = supply(runner).step(runner.params, step=1)
    stream, parts, unfinished = supply(runner, rollouts=2).step(runner.params, step=1), [], []
    for part in stream:
        parts.append(part)
        unfinished.append(sum(s.unfinished for s in runner.engine.exchange.schedulers.values()))
    assert [ids(part) for part in parts] == [["toy/000"], ["toy/001"]]
    assert unfinished == [1, 0]  # task 1 was still with its expert when the first part came
    assert_same_arrays(joined(parts), wanted)
    np.testing.assert_array_equal(parts[1].prompts.tokens[0], wanted.prompts.tokens[1])


def test_ahead_every_group_is_trained_once_and_in_time(runner: Runner) -> None:
    source, trained = supply(runner, ahead=1, staleness=1), []
    for step in range(1, 5):
        (rollout,) = source.step(runner.params, step)
        trained += ids(rollout)
        for group in rollout.trajectories:
            assert group[0].group is not None and group[0].group.version >= step - 1
            assert all(t.finished and len(t.versions) == len(t.tokens) for t in group)
    pulled = {toy.task(n).id for n in range(5 * GROUPS)}
    assert len(set(trained)) == len(trained) == 4 * GROUPS and set(trained) < pulled
    # The slow task of the first batch was waited for by the second step at the latest.
    assert "toy/001" in trained[: 2 * GROUPS]


def test_ahead_every_shard_gets_its_groups(toy_tokens: Tokens) -> None:
    """They once went to the first shards only, and a step waited for ever for the others'."""
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    runner = bigram_runner(toy_tokens, mesh, SlowForSome(0.1, "many 1?"))
    source, trained = supply(runner, ahead=1, staleness=1), []
    for step in range(1, 4):
        (rollout,) = source.step(runner.params, step)
        trained += ids(rollout)
    runner.dispatcher.close()
    assert len(set(trained)) == len(trained) == 3 * GROUPS


def test_a_group_that_outlives_its_step_is_as_it_would_have_been(runner: Runner) -> None:
    source = supply(runner, ahead=1, staleness=1)
    rollouts = [rollout for step in (1, 2) for rollout in source.step(runner.params, step)]
    (wanted,) = supply(runner).step(runner.params, step=1)
    by_id = {group[0].task.id: group for rollout in rollouts for group in rollout.trajectories}
    for group in wanted.trajectories:
        for found, alone in zip(by_id[group[0].task.id], group, strict=True):
            assert found.tokens == alone.tokens and found.calls == alone.calls


def test_an_interrupted_run_drops_and_repeats_nothing(runner: Runner) -> None:
    source, trained = supply(runner, ahead=1, staleness=2), []
    for step in (1, 2):
        trained += [name for rollout in source.step(runner.params, step) for name in ids(rollout)]
    state = json.loads(json.dumps(source.get_state()))
    again = supply(runner, ahead=1, staleness=2)
    again.set_state(state)
    for step in (3, 4):
        trained += [name for rollout in again.step(runner.params, step) for name in ids(rollout)]
    left = {record.task.id for record in again._origin}
    assert len(set(trained)) == len(trained)
    assert set(trained) | left == {toy.task(n).id for n in range(5 * GROUPS)}


def test_groups_under_way_stay_where_they_are(runner: Runner) -> None:
    source = supply(runner, ahead=1, staleness=2)
    next(source.step(runner.params, 1))
    state = source.get_state()
    assert any(state["done"].values())  # the slow task of the first batch is still with its expert
    with pytest.raises(ConfigError, match="2 processes and 2 batch shards .* this start has 1 and 1"):
        supply(runner, ahead=1, staleness=2).set_state(state | {"layout": [2, 2]})


# ---- outages -----------------------------------------------------------------------------------------------


def until_back(experts: SlowForSome, out: str, max_marked: float = 0.0) -> tuple[Outages, list[str]]:
    """Nobody answers some questions until the first line about it is written; and those lines."""
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        experts.out = ""

    experts.out = out
    return Outages(OutageConfig(max_marked, 60.0), [], lambda: {"Glyph": "away"} if experts.out else {}, note), lines


@pytest.mark.parametrize("rollouts", [1, 2])
def test_a_step_that_meets_an_outage_is_the_step_that_it_would_have_been(
    rollouts: int, runner: Runner, experts: SlowForSome
) -> None:
    wanted = joined(list(supply(runner, rollouts=rollouts).step(runner.params, step=1)))
    outages, lines = until_back(experts, "many 0?")
    source = supply(runner, rollouts=rollouts, outages=outages)
    found = list(source.step(runner.params, step=1))
    assert [ids(part) for part in found] == [["toy/000", "toy/001"]] if rollouts == 1 else [["toy/000"], ["toy/001"]]
    assert_same_arrays(joined(found), wanted)
    assert not any(t.marked for part in found for group in part.trajectories for t in group)
    assert len(lines) == 1 and "of the episodes of step 1 met an outage (away)" in lines[0]
    assert 0 < sum(source.marked.values()) <= 1  # it is told how much was marked at first
    list(source.step(runner.params, step=2))
    assert source.marked == {} and len(lines) == 1


def test_few_marked_episodes_are_left_out(runner: Runner, experts: SlowForSome) -> None:
    outages, lines = until_back(experts, "many 0?", max_marked=0.5)
    (found,) = supply(runner, outages=outages).step(runner.params, step=1)
    assert [any(t.marked for t in group) for group in found.trajectories] == [True, False] and not lines
    experts.out = ""


def test_a_part_with_a_marked_episode_waits_until_the_step_is_known(runner: Runner, experts: SlowForSome) -> None:
    """What is over and clean is given at once."""
    outages, lines = until_back(experts, "many 1?")
    stream = supply(runner, rollouts=2, outages=outages).step(runner.params, step=1)
    assert ids(next(stream)) == ["toy/000"] and not lines
    assert ids(next(stream)) == ["toy/001"] and len(lines) == 1


def test_ahead_what_met_an_outage_is_trained_once_and_unmarked(runner: Runner, experts: SlowForSome) -> None:
    outages, lines = until_back(experts, "many")
    source, trained = supply(runner, ahead=1, staleness=1, outages=outages), []
    for step in range(1, 5):
        (rollout,) = source.step(runner.params, step)
        trained += ids(rollout)
        assert not any(t.marked or not t.finished for group in rollout.trajectories for t in group)
    assert len(set(trained)) == len(trained) == 4 * GROUPS and lines
