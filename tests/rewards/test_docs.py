"""The answers that docs/grading.md shows are graded as it says."""

import ast
import re
from pathlib import Path

import pytest

from maestro_jax.rewards.graders import BUILT_IN, GRADERS, Answer, Graders
from maestro_jax.rewards.reward import EpisodeSummary, RewardConfig, Scorer, Turn
from maestro_jax.types import Task

DOCS = Path(__file__).parents[2] / "docs" / "grading.md"
_CODE = re.compile(r"`([^`]*)`")


def shown() -> list[tuple[Task, str, str]]:
    """(task, answer, verdict) of the rows of the table of thirty answers."""
    text = DOCS.read_text(encoding="utf-8").partition("## Thirty answers")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [
        (
            Task("", "", (), (_CODE.findall(gold)[0],), source, tuple(_CODE.findall(options))),
            _CODE.findall(answer)[0],
            verdict,
        )
        for source, gold, options, answer, verdict in rows[2:]
    ]


def test_the_thirty_answers() -> None:
    rows = shown()
    assert len(rows) == 30
    found = BUILT_IN.outcomes([Answer(task, answer) for task, answer, _ in rows])
    assert [("right" if right else "wrong") for right in found] == [verdict for *_, verdict in rows]


def test_the_example_of_own_graders_and_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## Graders of your own")[2]
    code, settings = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "my_graders.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    own, terms = (ast.literal_eval(line.partition(" = ")[2]) for line in settings.splitlines())
    scorer = Scorer(RewardConfig(terms=terms), Graders(own))
    task = Task("g/1", "What does the gauge read?", (), ("200",), "gauges")
    episodes = [EpisodeSummary(text, 1, True, 0, 0, turns=(Turn("", 10),)) for text in ("201", "208", "220", "high")]
    found = scorer([(task, episode) for episode in episodes])
    assert [parts.outcome for parts in found] == [1.0, 0.5, 0.0, 0.0]
    assert [parts.terms for parts in found] == [{"brevity": -0.01}] * 4
    assert scorer.graders.find("whatever") is GRADERS["reading"]


def test_every_source_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert not [source for source in GRADERS if source.replace("HRBench-8K", "-8K") not in text]
