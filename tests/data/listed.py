"""Sources in memory."""

import dataclasses
import weakref
from collections.abc import Iterable

from maestro_jax.errors import DataError
from maestro_jax.types import Task


class Listed(list[Task]):
    """Tasks as a source of their own."""

    def where(self, index: int) -> str:
        return f"toy.parquet row {index}"


class Fresh(Listed):
    """Tasks that are made anew whenever they are read, and counted while anybody holds them."""

    def __init__(self, tasks: Iterable[Task]):
        super().__init__(tasks)
        self.alive: weakref.WeakValueDictionary[int, Task] = weakref.WeakValueDictionary()
        self.reads = self.most_alive = 0

    def __getitem__(self, index: int) -> Task:  # type: ignore[override]
        self.reads += 1
        made = self.alive[self.reads] = dataclasses.replace(super().__getitem__(index))
        self.most_alive = max(self.most_alive, len(self.alive))
        return made


class Damaged(Listed):
    """Tasks of which some rows cannot be read."""

    def __init__(self, tasks: list[Task], damaged: set[int]):
        super().__init__(tasks)
        self.damaged = damaged

    def __getitem__(self, index: int) -> Task:  # type: ignore[override]
        if index in self.damaged:
            raise DataError(f"{self.where(index)}: damaged; remove the row")
        return super().__getitem__(index)


def numbered(count: int, name: str = "toy") -> Listed:
    """Tasks without images."""
    return Listed(Task(f"{name}/{i:03d}", f"question {i}?", (), (str(i),), name) for i in range(count))
