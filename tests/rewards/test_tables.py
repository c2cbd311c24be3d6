"""Every family's grading table holds, and is large enough to mean something."""

import pytest

from maestro_jax.rewards.graders import BUILT_IN, Answer
from tests.rewards.rows import FAMILIES, read_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verdicts_of_a_family(family: str) -> None:
    rows = read_rows(family)
    verdicts = BUILT_IN.outcomes([Answer(row.task, row.answer) for row in rows])
    wrong = [
        f"{row.where}: {row.answer!r} for {row.task.answers} graded {verdict}"
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict != row.right
    ]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_has_enough_rows_of_both_verdicts_and_none_twice(family: str) -> None:
    rows = read_rows(family)
    assert len(rows) >= 200
    assert min(sum(row.right for row in rows), sum(not row.right for row in rows)) >= 50
    assert len({(row.task, row.answer) for row in rows}) == len(rows)
