"""Fixed routings: every pair on every task, and what is drawn from that matrix."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from maestro_jax.data.source import TaskView
from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.baselines import QUERY, Baselines, check_pairs, run_baselines, summarise
from maestro_jax.parallel import preemption
from maestro_jax.registry.description.config import ExpertConfig, Pair, RegistryConfig, SkillConfig
from maestro_jax.rewards.graders import Graders
from maestro_jax.rewards.reward import RewardConfig, Scorer
from maestro_jax.rollout import outages
from maestro_jax.rollout.outages import RETRIES, OutageConfig, Outages
from maestro_jax.types import Call, Observation, Status, Task
from tests.data.listed import Fresh

SOURCES = ("counting", "reading", "charts")
PAIRS = [("A", "X"), ("A", "Y"), ("B", "X"), ("B", "Y")]


def task(number: int, source: str, answer: str = "7") -> Task:
    return Task(f"{source}/{number}", f"question {number}?", (b"image",), (answer,), source)


MATRICES = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from(SOURCES), min_size=n, max_size=n),
        npst.arrays(np.float64, (n, len(PAIRS)), elements=st.sampled_from([0.0, 1.0])),
    )
)


@given(MATRICES)
def test_rows_are_those_of_plain_loops(case: tuple[list[str], np.ndarray]) -> None:
    sources, right = case
    found = summarise(sources, PAIRS, right)
    rows = {source: [r for s, r in zip(sources, right, strict=True) if s == source] for source in sorted(set(sources))}
    best = {source: max(sum(column) / len(of) for column in zip(*of, strict=True)) for source, of in rows.items()}
    assert found.domain_oracle["overall"] == pytest.approx(
        sum(best[source] * len(of) for source, of in rows.items()) / len(right)
    )
    for source, of in {"overall": list(right), **rows}.items():
        assert found.random[source] == pytest.approx(np.mean(of))
        assert found.task_oracle[source] == pytest.approx(np.mean([max(row) for row in of]))
        assert found.best_single_pair[source] == pytest.approx(np.mean(of, axis=0)[PAIRS.index(found.single_pair)])
    assert {source: found.domain_oracle[source] for source in rows} == pytest.approx(best)
    assert found.best_single_pair["overall"] == pytest.approx(right.mean(axis=0).max())
    assert found.random["overall"] <= found.best_single_pair["overall"] + 1e-12
    assert found.best_single_pair["overall"] <= found.domain_oracle["overall"] + 1e-12
    assert found.domain_oracle["overall"] <= found.task_oracle["overall"] + 1e-12
    for source, of in rows.items():
        assert [found.by_pair[source][pair] for pair in PAIRS] == pytest.approx(np.mean(of, axis=0).tolist())


def test_baselines_survive_their_json_file() -> None:
    right = np.array([[1.0, 0, 0, 0], [0, 1, 0, 1]])
    found = summarise(["counting", "reading"], PAIRS, right)
    assert Baselines.from_json(json.loads(json.dumps(found.to_json()))) == found


class Desk:
    """A dispatcher that answers all calls in portions, the newest first."""

    def __init__(self, answers: dict[Pair, Observation]):
        self.answers = answers
        self.calls: list[tuple[Call, str, tuple[bytes, ...]]] = []
        self.replies: list[tuple[int, Observation]] = []
        self.voided: list[str] = []

    def submit(self, ticket: int, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> None:
        self.calls.append((call, question, images))
        self.replies.append((ticket, self.answers[Pair(call.expert, call.skill)]))

    def check(self) -> None:
        """No call ends with an error of the user's."""

    def void(self, askers: list[str]) -> None:
        self.voided += askers

    def wait(self, timeout: float) -> bool:
        return bool(self.replies)

    def collect(self) -> list[tuple[int, Observation]]:
        half = len(self.replies) // 2
        self.replies, ready = self.replies[:half], self.replies[half:]
        return ready[::-1]


def registry(**skills: tuple[str, ...]) -> RegistryConfig:
    """Two experts; skill → the experts that may run it. A hidden tier-2 skill is there too."""
    experts = tuple(ExpertConfig(name, "", "builtins:object") for name in ("A", "B"))
    shown = tuple(SkillConfig(name, experts=allowed) for name, allowed in skills.items())
    return RegistryConfig(experts, (), (*shown, SkillConfig("Hidden", tier=2, shown=False)))


def test_every_allowed_pair_is_asked_about_every_task() -> None:
    desk = Desk({Pair(*pair): Observation("7", Status.OK) for pair in PAIRS})
    tasks, ticks = [task(0, "counting"), task(1, "reading")], []
    found = run_baselines(tasks, registry(X=(), Y=("B",)), desk, Scorer(), 9.0, ticks.append)  # type: ignore[arg-type]
    allowed = [("A", "X"), ("B", "X"), ("B", "Y")]
    assert desk.calls == [(Call(*pair, QUERY), t.question, t.images) for t in tasks for pair in allowed]
    assert list(found.by_pair["counting"]) == allowed
    assert ticks[-1] == len(desk.calls)


def test_replies_are_graded_against_their_own_task() -> None:
    answers = {
        Pair("A", "X"): Observation("7", Status.OK),
        Pair("A", "Y"): Observation("8", Status.OK),
        Pair("B", "X"): Observation("7", Status.UNAVAILABLE),  # a failure is never right, whatever its text
        Pair("B", "Y"): Observation("I cannot tell.", Status.OK),
    }
    tasks = [task(0, "counting", "7"), task(1, "counting", "7"), task(2, "reading", "8")]
    found = run_baselines(tasks, registry(X=(), Y=()), Desk(answers), Scorer(), 9.0, lambda done: None)  # type: ignore[arg-type]
    assert found.by_pair["counting"] == {("A", "X"): 1.0, ("A", "Y"): 0.0, ("B", "X"): 0.0, ("B", "Y"): 0.0}
    assert found.by_pair["reading"] == {("A", "X"): 0.0, ("A", "Y"): 1.0, ("B", "X"): 0.0, ("B", "Y"): 0.0}
    assert (found.single_pair, found.domain_oracle["overall"]) == (("A", "X"), 1.0)


class Forgetful(Desk):
    def submit(self, ticket: int, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> None:
        super().submit(ticket, call, question, (), deadline)


def test_tasks_are_in_memory_while_they_are_asked_about() -> None:
    """With their images; without, they are graded."""
    source = Fresh(task(number, "counting") for number in range(500))
    desk = Forgetful({Pair(*pair): Observation("7", Status.OK) for pair in PAIRS})
    view = TaskView(source, range(len(source)))
    found = run_baselines(view, registry(X=(), Y=()), desk, Scorer(), 9.0, lambda done: None)  # type: ignore[arg-type]
    assert found.random["overall"] == 1.0 and len(desk.calls) == 500 * len(PAIRS)
    assert source.most_alive < 5 and source.reads < 5 * 500


# ---- experts that fail -------------------------------------------------------------------------------------

LOST = Observation("gone", Status.UNAVAILABLE)


def patient(shunned: dict[str, str], note: Callable[[str], None], patience: float = 60.0) -> Outages:
    return Outages(OutageConfig(0.2, patience), ["A", "B"], lambda: shunned, note)


def test_calls_that_met_an_outage_are_made_again() -> None:
    """They once counted as wrong: the best pair was cached with 25 % instead of 100 %."""
    answers = {Pair(*pair): Observation("7", Status.OK) for pair in PAIRS} | {Pair("A", "X"): LOST}
    desk, out = Desk(answers), {"A": "no connection"}

    def note(line: str) -> None:
        assert line.startswith("waiting for A (25 %): 25 % of 8 calls met an outage (no connection)")
        desk.answers[Pair("A", "X")] = Observation("7", Status.OK)
        out.clear()

    tasks = [task(0, "counting"), task(1, "reading")]
    found = run_baselines(tasks, registry(X=(), Y=()), desk, Scorer(), 9.0, lambda done: None, patient(out, note))  # type: ignore[arg-type]
    assert (found.random["overall"], found.missing) == (1.0, 0)
    assert [(call.expert, call.skill) for call, _, _ in desk.calls[8:]] == [("A", "X")] * 2
    assert desk.voided == ["ticket 0", "ticket 4"]


def test_baselines_of_experts_that_stay_away_are_none() -> None:
    desk = Desk({Pair(*pair): LOST for pair in PAIRS})
    with pytest.raises(preemption.Preempted) as stop:
        run_baselines(
            [task(0, "x")],
            registry(X=(), Y=()),
            desk,
            Scorer(),
            9.0,
            lambda done: None,
            patient({"A": "away"}, print, 0),
        )  # type: ignore[arg-type]
    assert stop.value.reason.startswith("waited 0 s (config.rollout.patience) for A (50 %) and B (50 %)")


def test_baselines_of_experts_that_refuse_everything_are_the_users_to_mend() -> None:
    desk = Desk({Pair(*pair): Observation("no", Status.CONFIG_ERROR) for pair in PAIRS})
    with pytest.raises(ConfigError, match="4 of 4 calls were refused by A .*maestro_jax.doctor"):
        run_baselines([task(0, "x")], registry(X=(), Y=()), desk, Scorer(), 9.0, lambda done: None, patient({}, print))  # type: ignore[arg-type]


def test_a_call_that_always_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.0)
    tasks = [task(number, "counting") for number in range(6)]

    class Stubborn(Desk):
        def submit(self, ticket: int, call: Call, *told: Any) -> None:
            super().submit(ticket, call, *told)
            if ticket == 0:
                self.replies[-1] = (ticket, Observation("", Status.TIMEOUT))

    desk = Stubborn({Pair(*pair): Observation("7" if pair[1] == "X" else "8", Status.OK) for pair in PAIRS})
    found = run_baselines(tasks, registry(X=(), Y=()), desk, Scorer(), 9.0, lambda done: None, patient({}, print))  # type: ignore[arg-type]
    assert len(desk.calls) == 24 + RETRIES
    assert (found.missing, found.by_pair["counting"][("A", "X")], found.task_oracle["overall"]) == (1, 1.0, 1.0)
    assert found.random["overall"] == pytest.approx((1 / 3 + 5 / 2) / 6)


def test_a_pair_that_hardly_ever_answered_is_no_best_one() -> None:
    right = np.zeros((20, len(PAIRS)))
    right[0, 0], right[1:, 0] = 1.0, np.nan
    with pytest.raises(preemption.Preempted) as stop:
        check_pairs(PAIRS, right, patient({}, print))
    assert stop.value.reason.startswith("19 of 20 calls of A with X have no answer of A (95 %)")


def test_a_judge_without_verdicts_is_named_and_no_expert() -> None:
    """The run once ended with 75, "the expert gave no answer", whenever it was started."""

    class Silent:
        def __call__(self, asked: Sequence[Any], episodes: int) -> list[float]:
            return [math.nan] * len(asked)

        def check(self, unjudged: Sequence[str]) -> None:
            raise ConfigError(f"judged by {sorted(set(unjudged))}")

    config = registry(X=(), Y=())
    judge = ExpertConfig("Referee", "", "builtins:object", shown=False)
    config = dataclasses.replace(config, experts=(*config.experts, judge))
    scorer = Scorer(RewardConfig(), Graders({"counting": {"judge": "Referee"}}, config), Silent())
    desk = Desk({Pair(*pair): Observation("7", Status.OK) for pair in PAIRS})
    with pytest.raises(ConfigError, match=r"judged by \['', 'Referee'\]"):
        run_baselines(
            [task(0, "counting"), task(1, "reading")], config, desk, scorer, 9.0, lambda done: None, patient({}, print)
        )  # type: ignore[arg-type]


def test_few_tasks_are_in_memory_where_graders_see_images() -> None:
    source = Fresh(task(number, "words") for number in range(500))
    scorer = Scorer(RewardConfig(), Graders({"words": "tests.rewards.mine:sees_images"}))
    desk = Forgetful({Pair(*pair): Observation("7", Status.OK) for pair in PAIRS})
    view = TaskView(source, range(len(source)))
    run_baselines(view, registry(X=(), Y=()), desk, scorer, 9.0, lambda done: None)  # type: ignore[arg-type]
    assert source.most_alive < 100
