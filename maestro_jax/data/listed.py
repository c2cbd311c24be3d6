"""Tasks of the user's own making as a source: a function of the user's in, a checked source out.

    def open_tasks(paths, split, image_root) -> Sequence[Task]

The sequence has a length and gives a `Task` for a number, from several threads. What it gives is checked, since it
comes from foreign code: a wrong task is a damaged row, whose error names function, row, field and cure.
"""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.data.rows import Row, describe
from maestro_jax.data.source import Label, file_stamps
from maestro_jax.errors import DataError, UserError
from maestro_jax.images import check_image
from maestro_jax.plugins import load, one_line
from maestro_jax.types import Task


def is_plugin(kind: str) -> bool:
    """Whether `config.data.kind` names a function of the user's."""
    return ":" in kind


class ListedSource:
    """The tasks that a function of the user's opens.

    Args:
      kind: "package.module:name".
      paths, split, image_root: what it is called with, as `open_source` gets them.

    Raises:
      ConfigError: there is no such function.
      DataError: it raised, or gave no sequence; on reading, a wrong task.
    """

    def __init__(self, kind: str, paths: Sequence[str], split: str, image_root: str):
        self._kind, self._paths, self._given = kind, tuple(paths), [split, image_root]
        opening = load(kind, "config.data.kind")
        try:
            self._tasks: Sequence[Task] = opening(self._paths, split, image_root)
            self._length = len(self._tasks)
        except UserError:  # theirs, in our words already
            raise
        except Exception as error:
            raise DataError(f"{kind} cannot open its tasks ({one_line(error)}); correct it or what it reads") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < self._length:
            raise IndexError(f"task {index} of {self._length}")
        try:
            task = self._tasks[index]
        except UserError:
            raise
        except Exception as error:
            raise DataError(f"{self.where(index)} cannot be read ({one_line(error)}); correct it") from error
        self._check(task, index)
        return task

    def where(self, index: int) -> str:
        return f"{self._kind} row {index}"

    def labels(self) -> Iterator[Label | None]:
        for index in range(self._length):
            try:
                task = self[index]
            except UserError:
                yield None
            else:
                yield Label(task.id, task.source, task.grader)

    def stamp(self) -> list[Any]:
        files = [Path(path) for path in self._paths]
        if not files or not all(path.is_file() for path in files):
            return [
                "listed",
                secrets.token_hex(8),
            ]  # nobody knows when it changes, so it is gone through at every start
        return ["listed", self._kind, *self._given, self._length, *file_stamps(files)]

    def _check(self, task: Any, index: int) -> None:
        where = self.where(index)
        if not isinstance(task, Task):
            raise DataError(f"{where} is {describe(task)}; give a maestro_jax.types.Task")
        row = Row(vars(task), where, index)
        for name in ("id", "question", "source", *(name for name in ("kind", "grader") if getattr(task, name) != "")):
            row.text(name)
        for name, kind in (("answers", str), ("choices", str), ("images", bytes)):
            if not all(isinstance(item, kind) for item in row.values(name, tuple)):
                raise row.error(name, f"expected a tuple of {kind.__name__} only; correct it or remove the row")
        for number, image in enumerate(task.images):
            check_image(image, f"{where}, field images[{number}]")
