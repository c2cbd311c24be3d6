"""Experts that fail: every episode ends, what failed is marked, and nothing that is marked is learnt from."""

import asyncio
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from maestro_jax.grpo.batch import make_microbatches, score_rollout
from maestro_jax.grpo.microbatches import Planner
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.registry.dispatch import GRACE_SECONDS, Dispatcher
from maestro_jax.rewards.reward import RewardConfig, Scorer
from maestro_jax.rollout import protocol
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.exchange import Exchange
from maestro_jax.types import Call, Observation, Status
from tests.rollout import episodes

GROUPS, MEMBERS = 4, 4
TASKS = [episodes.task(number) for number in range(GROUPS)]
DEADLINE = 0.5  # seconds
ROOM = 160  # for every reply, so that who heard another one has other tokens
EPISODE = dataclasses.replace(episodes.EPISODE, deadline=DEADLINE, room=ROOM)
CONFIG = dataclasses.replace(
    episodes.ENGINE, room=ROOM, lanes=GROUPS * MEMBERS // 2, parked_tokens=2 * ROOM, parked_on_host=2**30
)
At = tuple[int, int]


# ---- an expert that never answers --------------------------------------------------------------------------


class OneIsSilent(episodes.Experts):
    """While `silent`, nothing ever comes from the expert Lens."""

    silent = False

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        if self.silent and call.expert == "Lens":
            await asyncio.Event().wait()
        return await super().call(call, question, images, deadline)


@dataclasses.dataclass(frozen=True)
class Silence:
    healthy: Rollout
    rollout: Rollout
    seconds: float  # of `rollout`


@pytest.fixture(scope="module")
def silence(talker: episodes.Talker) -> Silence:
    experts = OneIsSilent(0.0)
    with episodes.engine(talker, Dispatcher(experts), CONFIG, episode=EPISODE) as run:
        healthy = run(TASKS, MEMBERS)
        experts.silent = True
        start = time.monotonic()
        rollout = run(TASKS, MEMBERS)
        return Silence(healthy, rollout, time.monotonic() - start)


def asked_lens(rollout: Rollout) -> dict[At, bool]:
    members = {(g, m): t for g, group in enumerate(rollout.trajectories) for m, t in enumerate(group)}
    return {at: any(call.expert == "Lens" for call, _ in t.calls) for at, t in members.items()}


def test_a_silent_expert_ends_at_the_deadline_and_the_step_goes_on(silence: Silence) -> None:
    # All wait at the same time; without a deadline this would never end.
    assert silence.seconds < 10.0
    lost = [t for group in silence.rollout.trajectories for t in group if t.marked]
    for trajectory in lost:
        waited = sum(observation.seconds for _, observation in trajectory.calls)
        assert waited <= DEADLINE + GRACE_SECONDS * len(trajectory.calls) + 1.0  # the last second is this machine's


def test_exactly_who_asked_it_is_marked(silence: Silence) -> None:
    asked = asked_lens(silence.rollout)
    assert {True, False} <= set(asked.values())
    for (g, m), met in asked.items():
        trajectory = silence.rollout.trajectories[g][m]
        assert trajectory.finished and trajectory.marked == met
        for call, observation in trajectory.calls:
            assert observation.status == (Status.TIMEOUT if call.expert == "Lens" else Status.OK)


def test_all_others_write_what_they_would_have_written(silence: Silence) -> None:
    found, wanted = episodes.episodes(silence.rollout), episodes.episodes(silence.healthy)
    for at, met in asked_lens(silence.rollout).items():
        assert (found[at] == wanted[at]) is not met


def test_what_is_marked_is_out_of_baseline_and_loss(silence: Silence, talker: episodes.Talker) -> None:
    scored = score_rollout(silence.rollout, Scorer(RewardConfig(cost_weight=1.0)))
    valid = ~np.array(list(asked_lens(silence.rollout).values())).reshape(GROUPS, MEMBERS)
    np.testing.assert_array_equal(scored.valid, valid)
    root, prefix = silence.rollout.prompts.root, silence.rollout.prompts.tokens.shape[1]
    planner = Planner(talker.policy.architecture, len(root), MEMBERS, GROUPS, 1, 1, (prefix,), (EPISODE.room,))
    (part,), _, _, _ = make_microbatches(silence.rollout, scored, "none", False, planner, episodes.one_device())
    mask, advantages = jax.device_get((part.mask, part.advantages))
    assert (~valid).any() and mask[valid].any() and not mask[~valid].any()
    kept = [scored.rewards[g][valid[g]] for g in range(GROUPS)]
    wanted = np.zeros((GROUPS, MEMBERS))
    for g in range(GROUPS):
        wanted[g][valid[g]] = kept[g] - kept[g].mean()
    assert wanted.any()
    np.testing.assert_allclose(advantages, wanted, atol=1e-6)


# ---- calls that fail ---------------------------------------------------------------------------------------


class Flaky(episodes.Experts):
    """Some calls end as UNAVAILABLE, as many are lost to an exception in the registry."""

    def __init__(self, share: float):
        super().__init__(longest=0.01)
        self.share = share
        self.asked: Counter[str] = Counter()  # queries, which tell whose they are
        self.failed: list[str] = []  # queries

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        self.asked[call.query] += 1
        # Not by the order of arrival: the test should be the same every time.
        if episodes.draw(call.query, self.asked[call.query]) >= self.share * 2**64:
            return await super().call(call, question, images, deadline)
        self.failed.append(call.query)
        if len(self.failed) % 2:
            raise ConnectionError("reset by peer")
        return Observation("Gone.", Status.UNAVAILABLE)


@dataclasses.dataclass
class Outage:
    experts: Flaky
    rollouts: list[tuple[Rollout, list[str]]]  # with the queries that failed


@pytest.fixture(scope="module", params=[0.3, 1.0])
def outage(request: pytest.FixtureRequest, talker: episodes.Talker) -> Iterator[Outage]:
    experts = Flaky(request.param)
    found = Outage(experts, [])
    with episodes.engine(talker, episodes.NumberedDispatcher(experts), CONFIG) as run:
        for step in range(6):
            rollout = run(TASKS, MEMBERS, step=step)
            found.rollouts.append((rollout, experts.failed))
            experts.failed = []
        yield found


def test_failing_calls_stop_no_episode(outage: Outage) -> None:
    trajectories = [t for rollout, _ in outage.rollouts for group in rollout.trajectories for t in group]
    assert len(trajectories) == 6 * GROUPS * MEMBERS and all(t.finished for t in trajectories)
    calls, failed = outage.experts.asked.total(), sum(len(queries) for _, queries in outage.rollouts)
    assert sum(len(t.calls) for t in trajectories) == calls > len(trajectories) / 2
    assert failed / calls == pytest.approx(outage.experts.share, abs=0.1)


def test_exactly_what_failed_is_marked(outage: Outage) -> None:
    for rollout, failed in outage.rollouts:
        members = [t for group in rollout.trajectories for t in group]
        marked = {number for number, t in enumerate(members) if t.marked}
        assert marked == {int(query.split()[-1]) for query in failed}
        gone = [o.status for t in members for _, o in t.calls if o.status is not Status.OK]
        assert gone == [Status.UNAVAILABLE] * len(failed)


# ---- a fault of our own ------------------------------------------------------------------------------------


@pytest.fixture
def fails_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, int], None]:
    """Makes one call of a function raise, the others do as they did."""

    def patch(owner: Any, name: str, call: int) -> None:
        calls, whole = itertools.count(), getattr(owner, name)

        def broken(*args: Any) -> Any:
            if next(calls) == call:
                raise RuntimeError("a bug")
            return whole(*args)

        monkeypatch.setattr(owner, name, broken)

    return patch


def marked_by_shard(talker: episodes.Talker) -> list[int]:
    """How many episodes of each of two shards are marked; all are over."""
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    with episodes.engine(talker, Dispatcher(episodes.Experts(0.01)), CONFIG, mesh) as run:
        found = run(TASKS, MEMBERS).trajectories
    assert all(t.finished for group in found for t in group)
    return [sum(t.marked for group in half for t in group) for half in (found[:2], found[2:])]


def test_a_bug_in_the_exchange_ends_the_episodes_of_its_shard_only(
    talker: episodes.Talker, fails_once: Callable[[Any, str, int], None]
) -> None:
    """An exception that left the callback would hang or abort the device program."""
    fails_once(Exchange, "_collect", 4)
    by_shard = marked_by_shard(talker)
    assert min(by_shard) == 0 and max(by_shard) > MEMBERS


def test_a_turn_that_cannot_be_read_ends_its_own_episode_only(
    talker: episodes.Talker, fails_once: Callable[[Any, str, int], None]
) -> None:
    fails_once(protocol, "parse_turn", GROUPS)
    assert sorted(marked_by_shard(talker)) == [0, 1]
