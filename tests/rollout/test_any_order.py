"""Sampled episodes with real calls: neither the order in which experts answer nor the number of lanes shows in them."""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.scheduler import Orders, Scheduler
from maestro_jax.rollout.trajectory import Stage
from maestro_jax.types import Status
from tests.rollout import episodes

GROUPS, MEMBERS = 4, 4
TASKS = [episodes.task(number) for number in range(GROUPS)]
PARKED = dict(parked_tokens=episodes.EPISODE.room // 2, parked_on_host=2**30)
TOLERANCE = 1e-5  # fp32; other lanes share a matmul


def fingerprint(rollout: Rollout) -> str:
    """Of all tokens, the bits of their log-probabilities, and who wrote them."""
    digest = hashlib.sha256()
    for at, episode in sorted(episodes.episodes(rollout).items()):
        digest.update(repr((at, episode.tokens, episode.authored)).encode())
        digest.update(np.array(episode.logprobs, np.float32).tobytes())
    return digest.hexdigest()


class Shuffled:
    """One engine and its rollouts, each with another order of replies."""

    def __init__(self, run: episodes.Runner, experts: episodes.Experts):
        self.run, self.experts = run, experts

    def __call__(self, seed: int, longest: float) -> tuple[Rollout, list[str]]:
        self.experts.answered, self.experts.longest = [], longest
        self.experts.latency.seed(seed)
        return self.run(TASKS, MEMBERS), self.experts.answered


@pytest.fixture(scope="module")
def shuffled(talker: episodes.Talker) -> Iterator[Shuffled]:
    experts = episodes.Experts(0.0)
    config = dataclasses.replace(episodes.ENGINE, lanes=GROUPS * MEMBERS // 2, **PARKED)
    with episodes.engine(talker, Dispatcher(experts), config) as run:
        yield Shuffled(run, experts)


@pytest.fixture(scope="module")
def at_once(shuffled: Shuffled) -> tuple[Rollout, list[str]]:
    return shuffled(0, longest=0.0)


def test_episodes_have_calls_that_ran(at_once: tuple[Rollout, list[str]]) -> None:
    """What follows would hold for episodes without calls, too."""
    calls = [t.calls for group in at_once[0].trajectories for t in group]
    assert sum(len(each) for each in calls) == len(at_once[1]) > GROUPS * MEMBERS / 2
    assert max(len(each) for each in calls) >= 2
    assert all(observation.status is Status.OK for each in calls for _, observation in each)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_replies_changes_no_bit(seed: int, shuffled: Shuffled, at_once: tuple[Rollout, list[str]]) -> None:
    rollout, answered = shuffled(seed, longest=0.2)
    assert answered != at_once[1] and sorted(answered) == sorted(at_once[1])
    assert fingerprint(rollout) == fingerprint(at_once[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 15))
def test_replies_within_two_seconds_change_no_bit(
    seed: int, shuffled: Shuffled, at_once: tuple[Rollout, list[str]]
) -> None:
    rollout, answered = shuffled(seed, longest=2.0)
    assert answered != at_once[1] and sorted(answered) == sorted(at_once[1])
    assert fingerprint(rollout) == fingerprint(at_once[0])


@pytest.mark.parametrize("lanes", [4, 16])
def test_the_number_of_lanes_changes_no_token(
    lanes: int, talker: episodes.Talker, at_once: tuple[Rollout, list[str]]
) -> None:
    config = dataclasses.replace(episodes.ENGINE, lanes=lanes, **PARKED)
    with episodes.engine(talker, Dispatcher(episodes.Experts(0.05)), config) as run:
        found = episodes.episodes(run(TASKS, MEMBERS))
    episodes.assert_same(found, episodes.episodes(at_once[0]), TOLERANCE)


def test_a_reply_may_end_an_episode_while_its_lane_is_being_parked(
    shuffled: Shuffled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shard's callback takes replies, too, after this one gave its orders, before they are carried out."""
    plan, ended = Scheduler.plan, []

    def plan_and_hear(scheduler: Scheduler, version: int) -> tuple[Orders, bool]:
        orders = plan(scheduler, version)
        members = [member for group in scheduler.slots if group is not None for member in group.members]
        for member in members:
            on_host = member.parked is not None and not member.parked.pages
            if member.stage is Stage.WAITING and on_host:
                scheduler.finish(member)  # as when there is no room for what the expert said
                ended.append(member)
        return orders

    monkeypatch.setattr(Scheduler, "plan", plan_and_hear)
    rollout, _ = shuffled(0, longest=0.05)
    assert ended and all(t.finished for group in rollout.trajectories for t in group)
