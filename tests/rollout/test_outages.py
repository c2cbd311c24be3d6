"""Experts that are out: what failed is run again with the same keys, and is then what it would have been."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.parallel import preemption
from maestro_jax.registry.dispatch import CallRunner, Dispatcher
from maestro_jax.registry.record.journal import ASKER, Journal
from maestro_jax.registry.record.replay import Replay
from maestro_jax.rollout import outages
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.outages import RETRIES, Marks, OutageConfig, Outages
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.types import Call, Observation, Status
from tests.rollout import episodes

TASKS, MEMBERS = [episodes.task(number) for number in range(3)], 4


class Failing(episodes.Experts):
    """While `out`, calls fail: those of the expert Lens, or the second ones of all who ask."""

    def __init__(self, status: Status = Status.UNAVAILABLE, second_calls: bool = False):
        super().__init__(0.01)
        self.out, self.status, self.second_calls = True, status, second_calls

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        is_hit = ASKER.get().endswith("/2") if self.second_calls else call.expert == "Lens"
        if self.out and is_hit:
            return Observation("gone", self.status)
        return await super().call(call, question, images, deadline)

    def shunned(self) -> dict[str, str]:
        return {"Lens": "no connection"} if self.out and self.status is Status.UNAVAILABLE else {}


class Switch:
    """A `CallRunner` that hands over to another one."""

    to: CallRunner

    async def call(self, *asked: Any) -> Observation:
        return await self.to.call(*asked)

    def shunned(self) -> dict[str, str]:
        return self.to.shunned()

    async def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(outages, "LOOK_SECONDS", 0.01)


@dataclasses.dataclass(frozen=True)
class Desk:
    """One engine for all tests, whose programs are compiled once."""

    switch: Switch
    journal: Journal
    runner: episodes.Runner


@pytest.fixture(scope="module")
def desk(talker: episodes.Talker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    switch, journal = Switch(), Journal(str(tmp_path_factory.mktemp("desk") / "journal.jsonl"))
    with episodes.engine(talker, Dispatcher(switch, journal), episodes.ENGINE) as runner:
        yield Desk(switch, journal, runner)
    journal.close()


class Bench:
    """A rollout whose experts are out until so many lines about it were written."""

    def __init__(self, desk: Desk, section: str):
        self.desk, self.section = desk, section
        self.back_after, self.patience, self.max_marked = 3, 60.0, 0.0
        self.lines: list[str] = []
        self.waits: list[Mapping[str, float]] = []

    def outages(self, experts: Failing, replayed: bool = False) -> Outages:
        def note(line: str) -> None:
            self.lines.append(line)
            experts.out = len(self.lines) < self.back_after

        settings = OutageConfig(self.max_marked, self.patience)
        made = Outages(settings, ["Lens", "Tally", "Glyph"], experts.shunned, note, replayed)
        made.on_wait = self.waits.append
        return made

    def run(self, experts: CallRunner, patient: Outages | None) -> Rollout:
        self.desk.switch.to = experts
        self.desk.journal.begin(self.section)
        args = self.desk.runner.params, TASKS, len(TASKS), MEMBERS
        return self.desk.runner.engine.rollout(*args, seed=0, step=1, greedy=False, outages=patient)

    def calls(self) -> list[dict[str, str]]:
        """What the journal holds of this test's calls."""
        lines = list(map(json.loads, Path(self.desk.journal.path).read_text().splitlines()))
        begin = max(i for i, line in enumerate(lines) if line.get("name") == self.section)
        return [line for line in lines[begin:] if line["kind"] == "call"]


@pytest.fixture
def bench(desk: Desk, request: pytest.FixtureRequest) -> Bench:
    return Bench(desk, request.node.name)


@pytest.fixture(scope="module")
def healthy(desk: Desk) -> Rollout:
    return Bench(desk, "healthy").run(episodes.Experts(0.01), None)


def assert_equal(found: Rollout, wanted: Rollout) -> None:
    episodes.assert_same(episodes.episodes(found), episodes.episodes(wanted), tolerance=0.0)
    for group, like in zip(found.trajectories, wanted.trajectories, strict=True):
        assert [(m.calls, m.answer, m.marked) for m in group] == [(m.calls, m.answer, m.marked) for m in like]


def members(rollout: Rollout) -> list[Trajectory]:
    return [member for group in rollout.trajectories for member in group]


def test_what_met_an_outage_is_in_the_end_what_it_would_have_been(bench: Bench, healthy: Rollout) -> None:
    experts = Failing()
    found = bench.run(experts, bench.outages(experts))
    assert_equal(found, healthy)
    # The terminal names who is missing, and how much of it; so does whoever writes metrics.
    share = sum(any(call.expert == "Lens" for call, _ in m.calls) for m in members(healthy)) / 12
    assert 0 < share < 1 and bench.waits == [{"Lens": pytest.approx(share)}]
    assert bench.lines[0].startswith(f"waiting for Lens ({100 * share:.0f} %): {100 * share:.0f} % of a batch of 12")
    assert "(no connection), next try in" in bench.lines[0] and len(bench.lines) == 3


def test_nobody_who_has_answered_is_asked_again(bench: Bench, healthy: Rollout) -> None:
    experts, bench.max_marked = Failing(Status.TIMEOUT, second_calls=True), 1.0
    patient = bench.outages(experts)
    retried, patient._pause = [], lambda seconds: setattr(experts, "out", bool(retried.append(seconds)))  # type: ignore[method-assign]
    assert_equal(bench.run(experts, patient), healthy)
    assert len(retried) == 1
    good = Counter(line["asker"] for line in bench.calls() if line["status"] == "OK")
    first = [m.askers[0] for m in members(healthy) if len(m.calls) > 1]
    assert first and {good[asker] for asker in first} == {1}


def test_a_run_through_an_outage_is_replayed(bench: Bench, tmp_path: Path) -> None:
    experts = Failing(second_calls=True)
    recorded = bench.run(experts, bench.outages(experts))
    copy = shutil.copy(bench.desk.journal.path, tmp_path / "journal.jsonl")
    lines = len(bench.lines)
    replay = Replay(str(copy), bench.desk.journal)
    assert_equal(bench.run(replay, bench.outages(Failing(), replayed=True)), recorded)
    assert len(bench.lines) == lines > 0


def test_what_always_fails_is_left_when_its_expert_is_there(bench: Bench, healthy: Rollout) -> None:
    experts, bench.max_marked = Failing(Status.TIMEOUT), 1.0
    found = bench.run(experts, bench.outages(experts))
    hit = [any(call.expert == "Lens" for call, _ in m.calls) for m in members(found)]
    assert [m.marked for m in members(found)] == hit and any(hit) and not bench.lines
    asked = Counter(line["asker"] for line in bench.calls() if line["status"] == "TIMEOUT")
    assert max(asked.values()) == 1 + RETRIES


def test_experts_that_nobody_shuns_are_waited_for_like_others(bench: Bench, healthy: Rollout) -> None:
    experts, bench.back_after = Failing(Status.TIMEOUT), 2 + RETRIES
    assert_equal(bench.run(experts, bench.outages(experts)), healthy)
    assert len(bench.lines) == 2 + RETRIES


def test_a_server_that_answers_requests_and_no_probe_is_asked_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "LONGEST_PAUSE", 0.02)
    asked: list[int] = []
    patient = Outages(OutageConfig(0.0, 60.0), ["Lens"], lambda: {"Lens": "half-open"}, lambda line: None)
    of = {True: Marks(4, 4, 0, {"Lens": 4}), False: Marks(4, 0)}
    assert patient.insist(lambda: of[len(asked) < 1], lambda: asked.append(1), "calls").marked == 0
    assert asked == [1]


def test_only_waiting_uses_patience_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(outages.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    patient = Outages(OutageConfig(0.0, 1.0), ["Lens"], dict, lambda line: None)
    marks = Marks(4, 4, 0, {"Lens": 4})
    for _ in range(3):
        assert not patient.tolerates(marks, "episodes")
        clock[0] += 700.0  # the episodes run again
    with pytest.raises(preemption.Preempted):
        for _ in range(20):
            patient.tolerates(marks, "episodes")


def test_faults_of_our_own_are_no_outage() -> None:
    patient = Outages(OutageConfig(0.0, 60.0), ["Lens"], dict, lambda line: None)
    with pytest.raises(RuntimeError, match="4 of 4 episodes fail again and again, and no expert did"):
        for _ in range(RETRIES + 1):
            patient.tolerates(Marks(4, 4, 0, {outages.NOBODY: 4}), "episodes")


def test_an_outage_that_never_ends_stops_the_run(bench: Bench) -> None:
    experts, bench.back_after, bench.patience = Failing(), 10**9, 0.3
    with pytest.raises(preemption.Preempted) as stop:
        bench.run(experts, bench.outages(experts))
    assert stop.value.agreed and stop.value.reason.startswith("waited 0.3 s (config.rollout.patience) for Lens (")
    assert stop.value.reason.endswith("met an outage (no connection)")


def test_a_set_up_that_is_refused_is_not_waited_for(bench: Bench) -> None:
    patient = bench.outages(Failing())
    marks = Marks.of([(True, [("Lens", Status.CONFIG_ERROR)]), (False, [("Tally", Status.OK)])])
    for refuse in (patient.tolerates, patient.check):
        with pytest.raises(ConfigError, match=r"1 of 2 episodes were refused by Lens \(50 %\).*maestro_jax.doctor"):
            refuse(marks, "episodes")
    assert patient.insist(lambda: marks, lambda: pytest.fail("asked again"), "episodes") == marks
    assert not bench.lines


@pytest.mark.parametrize(("marked", "goes_on"), [(0, True), (2, True), (3, False)])
def test_few_marked_episodes_are_tolerated(marked: int, goes_on: bool, bench: Bench) -> None:
    bench.max_marked, bench.back_after = 0.2, 0
    marks = Marks.of((n < marked, [("Lens", Status.TIMEOUT if n < marked else Status.OK)]) for n in range(10))
    assert bench.outages(Failing()).tolerates(marks, "the episodes of step 3") is goes_on
    assert len(bench.lines) == (not goes_on)


@pytest.mark.parametrize("marked", [3, 10])
def test_an_evaluation_with_too_many_gaps_is_none(marked: int, bench: Bench) -> None:
    bench.max_marked = 0.2 if marked < 10 else 1.0
    marks = Marks.of((n < marked, [("Lens", Status.TIMEOUT)]) for n in range(10))
    with pytest.raises(preemption.Preempted) as stop:
        bench.outages(Failing()).check(marks, "held-out episodes")
    assert f"{marked} of 10 held-out episodes have no answer of Lens" in stop.value.reason


def test_who_is_out_behind_an_expert_is_waited_for(bench: Bench) -> None:
    """A skill asks a model that the policy may not call: that one is missing, not the expert that was called."""
    out = {"Finder": "no connection"}

    def note(line: str) -> None:
        bench.lines.append(line)
        out.clear()

    patient = Outages(OutageConfig(0.2, 60.0), ["Lens"], lambda: out, note)
    left = [Marks.of([(True, [("Lens", Status.UNAVAILABLE)])]), Marks.of([(False, [("Lens", Status.OK)])])]
    assert patient.insist(lambda: left[0], lambda: left.pop(0) and None, "calls").marked == 0
    assert bench.lines[0].startswith(
        "waiting for Lens (100 %) and Finder: 100 % of calls met an outage (no connection)"
    )
