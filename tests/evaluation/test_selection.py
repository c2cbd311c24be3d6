"""Tasks of an evaluation: the first ones of the benchmarks that are asked for, and no others."""

from collections.abc import Iterator
from typing import Any

import pytest

from maestro_jax.data.source import Label
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.evaluation.selection import select
from maestro_jax.types import Task


class Rows:
    """Tasks of these sources; a row without one cannot be read."""

    def __init__(self, *sources: str | None):
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Task:
        if (source := self.sources[index]) is None:
            raise DataError(f"{self.where(index)}: broken")
        return Task(str(index), "q", (), ("a",), source)

    def where(self, index: int) -> str:
        return f"row {index}"

    def labels(self) -> Iterator[Label | None]:
        return (source if source is None else Label(str(row), source) for row, source in enumerate(self.sources))

    def stamp(self) -> list[Any]:
        return list(self.sources)


ROWS = Rows("ChartQA", "SLAKE", "ChartQA", "SLAKE", "chartqa", "ERQA")


@pytest.mark.parametrize(
    ("benchmarks", "most", "rows"),
    [
        ([], 0, [0, 1, 2, 3, 4, 5]),
        ([], 1, [0, 1, 5]),
        (["slake"], 0, [1, 3]),
        ([" ChartQA", "ERQA"], 2, [0, 2, 5]),
        (["SLAKE", "Nothing"], 1, [1]),
    ],
)
def test_the_first_tasks_of_the_named_benchmarks_are_taken(benchmarks: list[str], most: int, rows: list[int]) -> None:
    notes: list[str] = []
    found = select(ROWS, benchmarks, most, notes.append)
    assert [found[i].id for i in range(len(found))] == [str(row) for row in rows]
    assert [found.where(i) for i in range(len(found))] == [f"row {row}" for row in rows]
    assert notes == (["--benchmarks=Nothing: the data has no such tasks"] if "Nothing" in benchmarks else [])


def test_benchmarks_that_the_data_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="--benchmarks=Nothing,None: the data has no such tasks"):
        select(ROWS, ["Nothing", "None"], 0, lambda line: None)


def test_a_row_that_cannot_be_read_is_left_to_whoever_reads_it() -> None:
    found = select(Rows("ERQA", None, "SLAKE"), ["ERQA"], 1, lambda line: None)
    assert len(found) == 2
    with pytest.raises(DataError, match="row 1: broken"):
        found[1]
