"""A pass over a source before it is used: can its tasks be told apart, and which sources and graders do they name?

Images are left out unless all of a task is asked for. What was found is kept in a file, by name, size and time of the
data's own files, so that data is gone through once.
"""

import array
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maestro_jax.data.source import Label, TaskSource
from maestro_jax.errors import DataError
from maestro_jax.observe.files import read_json, write_json
from maestro_jax.observe.progress import Progress

_VERSION = 2  # of what a survey looks at; one of another version counts for nothing
_LONG = 10_000  # rows of a pass that is worth a line
_LINES = 20  # of its progress in a log


class Origin(NamedTuple):
    """What tasks have in common, and the first row of one of them."""

    source: str
    grader: str
    row: int


def survey(source: TaskSource, name: str, kept: Path, progress: Progress, *, whole: bool = False) -> list[Origin]:
    """The names in the tasks' `source` and `grader`, in the order of the rows.

    Damaged rows are passed over, for they may be skipped later; with `whole` they are not.

    Args:
      name: of the source, for its progress.
      kept: file of what was found before; for all data of a work directory.
      whole: reads every task as it will be used, with its images.

    Raises:
      DataError: two rows with the same id; with `whole`, a row that cannot be read.
    """
    stamp = json.dumps([_VERSION, whole, source.stamp()]).encode()
    key = hashlib.blake2b(stamp, digest_size=16).hexdigest()
    found = read_json(kept)
    known = found if isinstance(found, dict) else {}
    if key not in known:
        known[key] = _survey(source, name, progress, whole)
        write_json(kept, known)
    return [Origin(*values) for values in known[key]]


def _survey(source: TaskSource, name: str, progress: Progress, whole: bool) -> list[Origin]:
    first: dict[tuple[str, str], int] = {}
    digests, rows = array.array("Q"), array.array("Q")  # a million ids as texts would be a hundred MB
    total = len(source)
    if total >= _LONG:
        progress.phase(f"check {name}", total)
    for row, label in enumerate(_labels(source, whole)):
        if total >= _LONG and row % max(total // _LINES, 1) == 0:
            progress.update(row)
        if label is None:
            continue
        first.setdefault((label.source, label.grader), row)
        digests.append(int.from_bytes(hashlib.blake2b(label.id.encode(), digest_size=8).digest(), "little"))
        rows.append(row)
    if total >= _LONG:
        progress.tick(total)
    _refuse_repeated(source, np.array(digests, np.uint64), np.array(rows, np.int64))
    return [Origin(*names, row) for names, row in first.items()]


def _labels(source: TaskSource, whole: bool) -> Iterator[Label | None]:
    if not whole:
        return source.labels()
    return (Label(task.id, task.source, task.grader) for task in (source[row] for row in range(len(source))))


def _refuse_repeated(source: TaskSource, digests: np.ndarray, rows: np.ndarray) -> None:
    """Looks at the ids themselves where their digests are equal."""
    order = np.argsort(digests, kind="stable")
    same = digests[order][1:] == digests[order][:-1]
    if not same.any():
        return
    suspects = {int(row) for at in np.flatnonzero(same) for row in rows[order[at : at + 2]]}
    seen: dict[str, int] = {}
    for row, label in enumerate(source.labels()):
        if label is None or row not in suspects:
            continue
        if label.id in seen:
            raise DataError(
                f"{source.where(row)}: its id {label.id!r} is that of {source.where(seen[label.id])}, too; give every "
                "task an id of its own"
            )
        seen[label.id] = row
