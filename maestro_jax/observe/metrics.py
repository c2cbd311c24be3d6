"""Metrics of a run, JSONL first: mappings come in, one JSON object a line goes out (and comes back).

Every figure and table is drawn from this file, so it is written so that a kill costs at most one
line and a resumed run replaces, never repeats, the steps it does again.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from maestro_jax import failpoints
from maestro_jax.errors import DataError
from maestro_jax.observe.files import writing


class MetricsWriter:
    """Appends rows to a JSONL file, each flushed at once.

    A line that a kill left half-written is dropped on opening.

    Args:
      path: of the file; None where another process writes it.
      tell: hears every row that is written, as JSON has it, when it is in the file.

    Raises:
      UserError: of every method, when the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, tell: Callable[[Mapping[str, Any]], None] | None = None):
        self.written = path is not None
        self._tell = tell
        self.path = Path(path or os.devnull)
        if not self.written:
            self._file = open(self.path, "a", encoding="utf-8")
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _drop_torn_line(self.path)
            self._file = open(self.path, "a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row.

        Args:
          row: must hold an integer "step"; numpy and device scalars become numbers, floats that
            are not finite become null.
        """
        if not isinstance(row.get("step"), int):
            raise TypeError(f"a metrics row needs an integer 'step', found {row.get('step')!r}")
        plain = _plain(row)
        with writing(self.path):
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        if self._tell is not None:
            self._tell(plain)

    def truncate_after(self, step: int) -> None:
        """Forgets rows of later steps, so that a run resumed from `step` does not write them twice.

        The file is replaced in one move: a kill leaves the old or the new one.
        """
        if not self.written:
            return
        self._file.close()
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with writing(self.path):
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
            failpoints.reach("in_truncate")
            temporary.replace(self.path)
            self._file = open(self.path, "a", encoding="utf-8")

    def sync(self) -> None:
        """Returns when everything written so far is on disk."""
        if self.written:
            with writing(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self.path):
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows in the order they were written; a half-written last line is left out.

    Raises:
      DataError: the file is missing, or a complete line is not a metrics row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name the metrics.jsonl of a run") from error
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"cannot read {path} line {number}: not a JSON object with a step; remove the line")
        rows.append(row)
    return rows


def _drop_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """JSON without NaN. Arrays of one element count as scalars, so that no caller must convert."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # numpy or jax scalar, without importing either
        return _plain(value.item())
    raise TypeError(f"cannot write a {type(value).__name__} as a metric; make it a number, text, list or dict")
