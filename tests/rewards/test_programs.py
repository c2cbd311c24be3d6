"""Answers that are programs: which program, and whether its tests ran to their end."""

import asyncio
from collections.abc import Iterator, Mapping

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.rewards.programs import Programs, TestRun, passes, passes_tests, program_in
from maestro_jax.sandbox.interface import Limits, Ran, RanStatus
from tests.rewards.rows import Row, read_programs

DOUBLE = "def solution(x):\n    return 2 * x"
TESTS = "assert solution(2) == 4\n"


class Scripted:
    """A sandbox that says what it is told to."""

    name = "scripted"

    def __init__(self, *statuses: RanStatus):
        self.statuses = list(statuses)

    async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Ran:
        return Ran("passed\n", "", self.statuses.pop(0), 0.0)

    async def close(self) -> None:
        pass


def wrong_rows(rows: list[Row], programs: Programs) -> list[str]:
    runs = [passes_tests(row.task, row.answer) for row in rows]
    ran = iter(programs.decide([run for run in runs if isinstance(run, TestRun)]))
    verdicts = [isinstance(run, TestRun) and next(ran) for run in runs]
    return [
        f"{row.where}: {row.answer}" for row, verdict in zip(rows, verdicts, strict=True) if verdict is not row.right
    ]


@pytest.fixture(scope="module")
def bare() -> Iterator[Programs]:
    """Runs what stands in this repository, which one may trust."""
    programs = Programs("unsafe_process")
    yield programs
    programs.close()


def test_the_table_has_enough_rows_of_both_verdicts_and_none_twice() -> None:
    rows = read_programs()
    assert len(rows) >= 200
    assert min(sum(row.right for row in rows), sum(not row.right for row in rows)) >= 50
    assert len({(row.task, row.answer) for row in rows}) == len(rows)


def test_verdicts_of_every_fifth_row(bare: Programs) -> None:
    assert not wrong_rows(read_programs()[::5], bare)


@pytest.mark.slow
def test_the_verdicts_of_the_table_in_the_sandbox() -> None:
    programs = Programs("auto")
    assert not wrong_rows(read_programs(), programs)
    programs.close()


@pytest.mark.parametrize("program", ["raise SystemExit", "import os; os._exit(0)", "print('passed')", "quit()"])
def test_leaving_before_the_tests_is_not_passing(bare: Programs, program: str) -> None:
    assert bare.decide([TestRun(f"{DOUBLE}\n{program}", TESTS), TestRun(DOUBLE, TESTS)]) == [program[0] == "p", True]
    assert bare.decide([TestRun(program, TESTS)]) == [False]


def test_names_of_typing_are_there_and_the_future_may_come_first(bare: Programs) -> None:
    typed = "def solution(x: Optional[int]) -> int:\n    return 2 * x"
    future = f"from __future__ import annotations\n{typed}"
    assert bare.decide([TestRun(typed, TESTS), TestRun(future, TESTS)]) == [True, True]


def test_a_sandbox_that_fails_is_asked_again_and_then_stops_the_run() -> None:
    sandbox = Scripted(RanStatus.UNAVAILABLE, RanStatus.UNAVAILABLE)
    with pytest.raises(ConfigError, match='"scripted" cannot run programs'):
        asyncio.run(passes(sandbox, TestRun(DOUBLE, TESTS)))
    again = Scripted(RanStatus.UNAVAILABLE, RanStatus.ERROR)
    assert not asyncio.run(passes(again, TestRun(DOUBLE, TESTS)))


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\r\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```python\ny = 1\n```", "y = 1\n"),
        ("```python\ndef solution(): 1\n```\nuse:\n```python\nsolution()\n```", "def solution(): 1\n"),
        ("```sh\nls\n```", ""),
        ("```python\nx = 1", ""),
        ("`" * 3000, ""),
    ],
)
def test_the_program_of_an_answer(answer: str, program: str) -> None:
    assert program_in(answer) == program


def test_programs_are_not_closed_before_they_were_opened() -> None:
    programs = Programs("unsafe_process")
    assert programs.decide([]) == []
    programs.close()
