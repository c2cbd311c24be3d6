"""Sources in memory."""

from maestro_jax.errors import DataError
from maestro_jax.types import Task


class Listed(list[Task]):
    """Tasks as a source of their own."""

    def where(self, index: int) -> str:
        return f"toy.parquet row {index}"


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
