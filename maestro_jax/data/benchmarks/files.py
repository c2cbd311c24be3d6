"""Files of published data sets as streams of rows: parquet, JSON, JSONL and TSV.

A row that cannot be read or converted comes as its `DataError`, so that whoever reads may count it and go on; a file
that cannot be read at all raises one.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.data.rows import Row, describe
from maestro_jax.errors import DataError
from maestro_jax.types import Task

Convert = Callable[[Row], Task]

_ROWS_AT_A_TIME = 4  # of a parquet file: an image of 8K makes a row of 10 MB and more
_MAX_FIELD = 1 << 30  # of a TSV file: an image in base64
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that can be read from the beginning, any number of times.

    Attributes:
      count: how many there are (a TSV with line breaks in its fields has fewer).
      read: starts reading.
    """

    count: int
    read: Callable[[], Iterator[Row | DataError]]


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The tasks of a split, converted as they are read: (file and row, task), or the `DataError` of a damaged row."""

    parts: tuple[tuple[Rows, Convert], ...]

    def __len__(self) -> int:
        return sum(rows.count for rows, _ in self.parts)

    def __add__(self, other: "Tasks") -> "Tasks":
        return Tasks(self.parts + other.parts)

    def __iter__(self) -> Iterator[tuple[str, Task] | DataError]:
        for rows, convert in self.parts:
            for row in rows.read():
                yield row if isinstance(row, DataError) else _converted(row, convert)


def tasks_of(rows: Rows, convert: Convert) -> Tasks:
    return Tasks(((rows, convert),))


def _converted(row: Row, convert: Convert) -> tuple[str, Task] | DataError:
    try:
        return row.where, convert(row)
    except DataError as error:
        return error


# ---- where the files are -----------------------------------------------------------------------------------


def parquet_files(directory: Path, split: str) -> list[Path]:
    """The files of a split in a download from Hugging Face: `data/test-00000-of-00001.parquet` or beside.

    Raises:
      DataError: one of the announced parts is missing.
    """
    paths = sorted([*directory.glob(f"{split}-*.parquet"), *(directory / "data").glob(f"{split}-*.parquet")])
    matches = [match for path in paths if (match := _SHARD.search(path.name))]
    announced = {int(match[2]) for match in matches}
    found = {int(match[1]) for match in matches}
    if announced and found != set(range(max(announced))):
        missing = sorted(set(range(max(announced))) - found)
        raise DataError(
            f"{paths[0].parent}: split {split} has {max(announced)} files, number {missing[0]} is missing; "
            "finish the download"
        )
    return paths


# ---- rows --------------------------------------------------------------------------------------------------


def parquet_rows(paths: Sequence[Path], columns: Sequence[str]) -> Rows:
    """Rows of parquet files behind each other, numbered through.

    Args:
      paths: at least one file.
      columns: which to read; one that a file lacks is absent from its rows.
    """
    opened = [_open_parquet(path) for path in paths]
    counts = [file.metadata.num_rows for file in opened]

    def read() -> Iterator[Row | DataError]:
        first = 0
        for path, count in zip(paths, counts, strict=True):
            yield from _parquet(path, columns, first)
            first += count

    return Rows(sum(counts), read)


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=1 << 20)  # without a buffer, whole column chunks are read at once
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: not a complete parquet file; download it again") from error


def _parquet(path: Path, columns: Sequence[str], first: int) -> Iterator[Row]:
    import pyarrow as pa

    file = _open_parquet(path)
    present = [name for name in file.schema_arrow.names if name in columns]
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=present):
            for fields in batch.to_pylist():
                yield Row(fields, f"{path} row {number}", first + number)
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: damaged behind row {number}; download it again") from error


def json_rows(path: Path, keep: Callable[[Mapping[str, Any]], bool] = lambda fields: True) -> Rows:
    """Objects of a JSON array; `keep` says which. The texts of all of them are in memory."""
    try:
        listed = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: not a complete JSON file; download it again") from error
    if not isinstance(listed, list):
        raise DataError(f"cannot read {path}: expected a JSON array, found {describe(listed)}; download it again")
    rows = [object_row(fields, f"{path} entry {number}", number) for number, fields in enumerate(listed)]
    rows = [row for row in rows if isinstance(row, DataError) or keep(row.fields)]
    return Rows(len(rows), lambda: iter(rows))


def object_row(fields: Any, where: str, number: int) -> Row | DataError:
    """What JSON held, which must be an object."""
    if not isinstance(fields, dict):
        return DataError(f"{where}: expected an object, found {describe(fields)}; correct it")
    return Row(fields, where, number)


def jsonl_rows(path: Path) -> Rows:
    """Objects of a JSONL file; blank lines are passed over."""

    def read() -> Iterator[Row | DataError]:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                where = f"{path} line {number + 1}"
                try:
                    if line.strip():
                        yield object_row(json.loads(line), where, number)
                except (ValueError, RecursionError):
                    yield DataError(f"{where}: not JSON; download the file again or remove the line")

    with open(path, "rb") as file:
        return Rows(sum(1 for line in file if line.strip()), read)


def tsv_rows(path: Path) -> Rows:
    """Rows of a TSV file with a header, as VLMEvalKit distributes data sets; an empty field is absent."""

    def read() -> Iterator[Row | DataError]:
        csv.field_size_limit(_MAX_FIELD)
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for number, fields in enumerate(csv.DictReader(file, delimiter="\t")):
                    where = f"{path} row {number}"
                    if None in fields or None in fields.values():
                        yield DataError(f"{where}: has not as many fields as the header; download the file again")
                    else:
                        yield Row({name: value for name, value in fields.items() if value}, where, number)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: not a complete TSV file; download it again") from error

    with open(path, "rb") as file:
        return Rows(max(sum(1 for _ in file) - 1, 0), read)
