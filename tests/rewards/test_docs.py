"""The answers that docs/grading.md shows are graded as it says."""

import re
from pathlib import Path

from maestro_jax.rewards.graders import BUILT_IN, GRADERS, Answer
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


def test_every_source_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert not [source for source in GRADERS if source.replace("HRBench-8K", "-8K") not in text]
