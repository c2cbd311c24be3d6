"""A rollout whose experts are gone is the recorded one, bit for bit."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.registry.record.journal import Journal
from maestro_jax.registry.record.replay import Replay, ReplayError, Resumed, read_calls
from maestro_jax.rollout.engine import Rollout
from maestro_jax.types import Call, Observation, Status, Usage
from tests.rollout import episodes

TASKS, MEMBERS = 3, 4


class Moody:
    """Experts whose replies are never the same again, late, out of order and sometimes lost."""

    def __init__(self, statuses: Sequence[Status] = (Status.OK, Status.OK, Status.OK, Status.TIMEOUT)) -> None:
        self.asked = 0
        self.statuses = statuses

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        self.asked += 1
        chance = random.SystemRandom()
        await asyncio.sleep(chance.uniform(0, 0.05))
        status = chance.choice(self.statuses)
        return Observation(f"{chance.random()}", status, chance.random(), Usage(1, 1, chance.random()))

    async def close(self) -> None:
        pass


def rollouts(talker: episodes.Talker, dispatcher: Dispatcher, first: int = 0) -> list[Rollout]:
    """Two steps, and the first again: the same task and key may come back in a run, as in evaluations."""
    tasks = [episodes.task(first + number) for number in range(TASKS)]
    with episodes.engine(talker, dispatcher, episodes.ENGINE) as run:
        return [run(tasks, MEMBERS, step=step) for step in (1, 2, 1)]


def test_replay_gives_the_same_trajectories_bit_for_bit(talker: episodes.Talker, tmp_path: Path) -> None:
    path = str(tmp_path / "journal.jsonl")
    experts, journal = Moody(), Journal(path)
    recorded = rollouts(talker, Dispatcher(experts, journal))
    journal.close()
    assert experts.asked > 20

    again = Journal(str(tmp_path / "again.jsonl"))
    replayed = rollouts(talker, Dispatcher(Replay(path, again), again))
    again.close()

    for theirs, ours in zip(recorded, replayed, strict=True):
        episodes.assert_same(episodes.episodes(ours), episodes.episodes(theirs), tolerance=0.0)
        for group, like in zip(ours.trajectories, theirs.trajectories, strict=True):
            for member, other in zip(group, like, strict=True):
                assert (member.calls, member.answer, member.marked) == (other.calls, other.answer, other.marked)
                assert member.price == other.price
    assert episodes.episodes(recorded[0]) != episodes.episodes(recorded[2])
    # The replay has written the same journal, but for the order in which replies came.
    lines = [sorted((tmp_path / name).read_text().splitlines()) for name in ("journal.jsonl", "again.jsonl")]
    assert lines[0] == lines[1]


def test_a_replay_of_another_run_stops(talker: episodes.Talker, tmp_path: Path) -> None:
    path = str(tmp_path / "journal.jsonl")
    journal = Journal(path)
    rollouts(talker, Dispatcher(Moody(), journal))
    journal.close()
    again = Journal(str(tmp_path / "again.jsonl"))
    with pytest.raises(ReplayError, match="replay with the recorded run's config"):
        rollouts(talker, Dispatcher(Replay(path, again), again), first=TASKS)
    again.close()


def test_an_interrupted_run_asks_only_what_was_not_answered(talker: episodes.Talker, tmp_path: Path) -> None:
    """Its experts never say the same twice, so whatever is equal was served from the journal.

    None of them fails: who fails is asked again, and what an episode asks after that is something else.
    """
    path = tmp_path / "journal.jsonl"
    journal = Journal(str(path))
    journal.begin("step 1")
    first = Moody([Status.OK])
    rollouts(talker, Dispatcher(first, journal))
    journal.close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:40])  # as a kill leaves it
    good = {(key.asker, key.request, seen) for key, seen in read_calls(str(path)) if seen.status is Status.OK}
    assert len(good) > 10

    again, experts = Journal(str(path)), Moody([Status.OK])
    resumed = Resumed(experts, again)
    assert resumed.recall({}) == len(good)
    again.begin("step 1")
    rollouts(talker, Dispatcher(resumed, again))
    again.close()

    calls = list(read_calls(str(path)))  # those of the second attempt
    assert good <= {(key.asker, key.request, seen) for key, seen in calls}
    assert experts.asked == len(calls) - len(good)
