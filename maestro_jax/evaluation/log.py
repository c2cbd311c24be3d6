"""Records of an evaluation on disk, in batches: each is there as a whole or not at all, so a killed one goes on."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError, DataError


class RecordLog:
    """A JSONL file: the records of a batch, then a line that ends the batch.

    Args:
      path: the file; what a kill left behind its last whole batch is dropped.
      is_whole: says of a batch whether it is as it should be; one that is not is dropped, too, and made again.

    Raises:
      DataError: a line of a whole batch is damaged.
      ConfigError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        is_whole: Callable[[Sequence[dict[str, Any]]], bool] = lambda records: True,
    ):
        self._path = Path(path)
        self._batches: dict[str, list[dict[str, Any]]] = {}
        self._met: set[str] = set()  # asked for or added since the start
        try:
            self._file = open(self._path, "a+b")
            self._file.truncate(self._read())
            if partial := [name for name, records in self._batches.items() if not is_whole(records)]:
                self._rewrite(without=partial)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); name another --output") from error

    def get(self, batch: str) -> list[dict[str, Any]] | None:
        """The records of a batch, or None if it is not there."""
        self._met.add(batch)
        return self._batches.get(batch)

    @property
    def is_ahead(self) -> bool:
        """Whether it holds batches that nobody has asked for yet."""
        return bool(self._batches.keys() - self._met)

    def add(self, batch: str, records: Sequence[dict[str, Any]]) -> None:
        """Appends a batch; on disk when this returns."""
        self._file.write(_lines(batch, records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._batches[batch] = list(records)

    def _rewrite(self, without: Sequence[str]) -> None:
        """The file without these batches takes the place of the old one in one move."""
        self._batches = {name: records for name, records in self._batches.items() if name not in without}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(b"".join(_lines(name, records) for name, records in self._batches.items()))
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        temporary.replace(self._path)
        self._file = open(self._path, "a+b")

    def close(self) -> None:
        self._file.close()

    def _read(self) -> int:
        """Reads whole batches; returns where the last one ends, in bytes."""
        self._file.seek(0)
        end, at, records = 0, 0, []
        for number, line in enumerate(self._file, start=1):
            at += len(line)
            if not line.endswith(b"\n"):
                break
            record = self._parsed(line, number)
            if "batch" not in record:
                records.append(record)
                continue
            self._batches[record["batch"]] = records
            end, records = at, []
        return end

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{self._path} line {number} is damaged; delete the file to evaluate again")
        return record


def _lines(batch: str, records: Sequence[dict[str, Any]]) -> bytes:
    lines = [*records, {"batch": batch, "records": len(records)}]
    return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
