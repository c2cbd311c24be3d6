"""The report: what is averaged over what, and that every measured thing is in its tables."""

import dataclasses
import json

import numpy as np
import pytest

from maestro_jax.evaluation.baselines import summarise as summarise_baselines
from maestro_jax.evaluation.episodes import Episode, MadeCall, by_source, routing_of
from maestro_jax.evaluation.report import markdown, summarise

PAIR = ("Tally", "Counting")


def episode(
    source: str, number: int, outcome: float, sample: int = 0, answer: str | None = "4", **turns: int
) -> Episode:
    calls = (MadeCall(*PAIR, "OK", 2.0, 0.01), MadeCall("Reader|2", "Reading", "TIMEOUT", 9.0, 0.0))
    turns = {"malformed": 0, "unresolved": 0, "cut": 0} | turns
    return Episode(
        f"{source}/{number}",
        source,
        sample,
        answer,
        outcome,
        outcome,
        True,
        False,
        1,
        calls,
        30,
        20,
        0.01,
        5.0,
        **turns,
    )


GREEDY = [episode("a", n, float(n < 3)) for n in range(4)] + [episode("b", 0, 0.0)]
SAMPLED = [
    episode(e.source, int(e.task[2:]), right, sample, answer)
    for e in GREEDY
    for sample, (answer, right) in enumerate([("4", 1.0), ("5", 0.0), ("5", 0.0), (None, 0.0)])
]


def test_benchmarks_are_averaged_alike_and_tasks_within_them() -> None:
    summary = summarise(GREEDY, SAMPLED, None, seed=0)
    assert summary["benchmarks"]["a"]["accuracy"]["mean"] == 0.75
    assert summary["average"]["accuracy"]["mean"] == pytest.approx(0.375)
    assert summary["average"]["price"] == pytest.approx(0.01)
    drawn = summary["benchmarks"]["a"]["sampled"]
    assert (drawn["samples"], drawn["mean"], drawn["majority"]) == (4, 0.25, 0.0)
    assert drawn["pass"] == pytest.approx({"1": 0.25, "2": 0.5, "4": 1.0})
    assert summary["latency"]["b"] == {"call_p50": 2.0, "call_p95": 2.0, "episode_p50": 5.0, "episode_p95": 5.0}
    assert summary["benchmarks"]["b"]["routing"] == [["Reader|2", "Reading", 1], ["Tally", "Counting", 1]]


def test_the_tables_hold_every_benchmark() -> None:
    right = summarise_baselines([e.source for e in GREEDY], [PAIR, ("Reader|2", "Reading")], np.array([[1, 0]] * 5))
    text = markdown({"policy": "step 3 of x"} | summarise(GREEDY, SAMPLED, right, seed=0))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| a | 4 | 75.0 [" in text and "pass@2 | pass@4 | majority@4 | random routing | best single pair" in text
    assert "| a | Reader\\|2 | Reading | 4 | 50.0 |" in rows
    for table in text.split("\n\n"):
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_turns_that_went_wrong_are_in_the_summary_and_its_tables() -> None:
    greedy = [episode("a", 0, 0.0, malformed=3, cut=1), episode("a", 1, 0.0, unresolved=1), episode("b", 0, 1.0, cut=2)]
    summary = summarise(greedy, [], None, seed=0)
    found = {
        name: [row[key] for key in ("malformed", "unresolved", "cut")] for name, row in summary["benchmarks"].items()
    }
    assert found == {"a": [1.5, 0.5, 0.5], "b": [0.0, 0.0, 2.0]}
    assert [summary["average"][key] for key in ("malformed", "unresolved", "cut")] == [0.75, 0.25, 1.25]
    text = markdown({"policy": "p"} | summary)
    assert "| benchmark | calls | malformed | unresolved | cut | tokens written |" in text
    assert "| a | 1.00 | 1.50 | 0.50 | 0.50 | 30 |" in text


@pytest.mark.parametrize(
    ("sources", "groups"),
    [
        (["a", "charts"], []),
        (["a", "chart_qa"], ["ten benchmarks of the paper"]),
        (["ERQA"], ["four out of domain"]),
        (["HRBench-8K", "humaneval-v"], ["ten benchmarks of the paper", "four out of domain"]),
    ],
)
def test_the_authors_figures_stand_beside_their_benchmarks_only(sources: list[str], groups: list[str]) -> None:
    summary = summarise([episode(source, 0, 1.0) for source in sources], [], None, seed=0)
    assert list(summary["reported"]) == groups
    text = markdown({"policy": "p"} | summary)
    assert ("not measured here" in text) == bool(groups)
    assert ("| ten benchmarks of the paper | Maestro-4B | 70.1 |" in text) == ("ten benchmarks of the paper" in groups)
    assert ("| four out of domain | Maestro-4B | 59.5 |" in text) == ("four out of domain" in groups)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    summary = summarise(GREEDY, [], None, seed=0)
    assert "sampled" not in summary["average"] and "baselines" not in summary["average"]
    text = markdown({"policy": "p"} | summary)
    assert "pass@" not in text and "random routing" not in text


def test_episodes_survive_their_json() -> None:
    assert [Episode.from_json(json.loads(json.dumps(e.to_json()))) for e in GREEDY] == GREEDY
    assert list(by_source(GREEDY)) == ["a", "b"]
    assert routing_of(GREEDY)["a"] == {PAIR: 4, ("Reader|2", "Reading"): 4}


def test_a_benchmark_all_of_whose_tasks_lack_a_sample_has_no_figure_of_samples() -> None:
    drawn = [dataclasses.replace(e, marked=e.sample == 0 and e.source == "a") for e in SAMPLED]
    summary = summarise(GREEDY, drawn, None, seed=0) | {"policy": "p"}
    assert summary["benchmarks"]["a"]["sampled"] == {"samples": 4, "missing": 4}
    assert "**4 of 5 tasks lack a sample's answer**" in (text := markdown(summary))
    assert next(row for row in text.splitlines() if row.startswith("| a |")).count("| - ") == 4


def test_gaps_of_the_baselines_are_told() -> None:
    right = np.array([[1.0, 0.0]] * 4 + [[np.nan, 0.0]])
    routed = summarise_baselines([e.source for e in GREEDY], [PAIR, ("Reader|2", "Reading")], right)
    assert "**1 of the baselines' calls not answered**" in markdown(
        summarise(GREEDY, [], routed, seed=0) | {"policy": "p"}
    )
