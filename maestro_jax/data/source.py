"""Sources of tasks: random access by number, as Grain needs. A stored data set in, `Task` objects out."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
from cachetools import LRUCache, cached

from maestro_jax.errors import ConfigError, DataError
from maestro_jax.types import Task

T = TypeVar("T")
FIELDS = ("id", "question", "images", "answers", "source")  # "choices", "kind" and "grader" may be there


@dataclasses.dataclass(frozen=True)
class Label:
    """What a task is called, where it comes from and who grades it, as in `Task`."""

    id: str
    source: str
    grader: str = ""


class TaskSource(Protocol):
    """A sized, random-access collection of tasks. Reading may happen from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Task:
        """The task at `index` in 0..len-1; raises `DataError` (file, row, field) when it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """File and row of a task, as its errors name them."""
        ...

    def labels(self) -> Iterator[Label | None]:
        """Those of all tasks in their order, read without images; None for a damaged row."""
        ...

    def stamp(self) -> list[Any]:
        """Plain JSON that changes when the data does."""
        ...


class OnDemand(Sequence[T]):
    """Items that are made whenever they are asked for: none is kept in memory, and slices are such sequences, too.

    Args:
      rows: what `make` is told of each.
    """

    def __init__(self, rows: Sequence[int], make: Callable[[int], T]):
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "OnDemand[T]": ...

    def __getitem__(self, index: int | slice) -> "T | OnDemand[T]":
        if isinstance(index, slice):
            return OnDemand(self._rows[index], self._make)
        return self._make(self._rows[index])


class TaskView(OnDemand[Task]):
    """The tasks at some rows of a source, as a source."""

    def __init__(self, source: TaskSource, rows: Sequence[int]):
        super().__init__(rows, source.__getitem__)
        self._source = source

    def where(self, index: int) -> str:
        return self._source.where(self._rows[index])

    def labels(self) -> Iterator[Label | None]:
        rows = frozenset(self._rows)
        return (label for row, label in enumerate(self._source.labels()) if row in rows)

    def stamp(self) -> list[Any]:
        return [self._source.stamp(), repr(self._rows)]


class ChainedSource:
    """Several sources behind each other."""

    def __init__(self, sources: Sequence[TaskSource]):
        self.sources = tuple(sources)
        self._starts = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Task:
        source, row = self._find(index)
        return source[row]

    def where(self, index: int) -> str:
        source, row = self._find(index)
        return source.where(row)

    def labels(self) -> Iterator[Label | None]:
        return itertools.chain.from_iterable(source.labels() for source in self.sources)

    def stamp(self) -> list[Any]:
        return [source.stamp() for source in self.sources]

    def _find(self, index: int) -> tuple[TaskSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[number], index - int(self._starts[number])


class TfdsSource:
    """A split of a TFDS data set in ArrayRecord format with the fields of a `Task`.

    Needs no TensorFlow: records are read by index and images stay encoded.

    Args:
      directory: the folder that holds `dataset_info.json`.
      split: "train", "test", or a TFDS slice such as "train[:100]".
    """

    def __init__(self, directory: str | os.PathLike[str], split: str):
        self.directory = Path(directory)
        self.split = split
        self._records = _open_records(self.directory, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        try:
            record = self._records[index]
            return Task(
                id=record["id"].decode(),
                question=record["question"].decode(),
                images=tuple(record["images"]),
                answers=tuple(answer.decode() for answer in record["answers"]),
                source=record["source"].decode(),
                choices=tuple(choice.decode() for choice in record.get("choices", ())),
                kind=record.get("kind", b"").decode(),
                grader=record.get("grader", b"").decode(),
            )
        # ArrayRecord reports a flipped bit as RuntimeError or IndexError, protobuf as its own ValueError-like kinds
        except Exception as error:
            raise DataError(
                f"cannot read {self.where(index)} ({type(error).__name__}); delete the directory and build it again"
            ) from error

    def where(self, index: int) -> str:
        return f"{self.directory} split {self.split} row {index}"

    def labels(self) -> Iterator[Label | None]:
        for index in range(len(self)):
            try:
                record = self._records[index]
                yield Label(record["id"].decode(), record["source"].decode(), record.get("grader", b"").decode())
            except Exception:  # as in reading
                yield None

    def stamp(self) -> list[Any]:
        return ["tfds", self.split, *file_stamps(path for path in sorted(self.directory.iterdir()) if path.is_file())]


def _open_records(directory: Path, split: str) -> Any:
    if not (directory / "dataset_info.json").is_file():
        raise DataError(
            f"no TFDS data set in {directory} (dataset_info.json is missing); "
            "build one with `python -m maestro_jax.suite.tasks.build` or `python -m maestro_jax.data.prepare` and name "
            "the folder it prints"
        )
    import tensorflow_datasets as tfds

    class Encoded(tfds.decode.SkipDecoding):
        """Leaves images as encoded bytes; TFDS's own class lacks the numpy methods."""

        def decode_example_np(self, example: np.ndarray) -> np.ndarray:
            return example

        decode_batch_example_np = decode_example_np

    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:
        raise DataError(
            f"cannot read {directory}/dataset_info.json; delete the directory and build it again"
        ) from error
    missing = [field for field in FIELDS if field not in (builder.info.features or {})]
    if missing:
        raise DataError(
            f"{directory}: data set lacks the field {missing[0]}; tasks need {', '.join(FIELDS)} (features.json)"
        )
    try:
        return builder.as_data_source(split, decoders={"images": Encoded()})
    except Exception as error:
        raise DataError(
            f"cannot open split {split!r} of {directory}, which has {', '.join(builder.info.splits)}; "
            "name one of these, or delete the directory and build it again if a file is missing"
        ) from error


def remembering(source: TaskSource, most_bytes: int) -> Callable[[int], Task]:
    """Reads tasks of a source; those that were read last stay in memory, up to so many bytes of images."""
    return cached(LRUCache(most_bytes, getsizeof=_image_bytes))(source.__getitem__)


def _image_bytes(task: Task) -> int:
    return sum(map(len, task.images))


def file_stamps(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files: what changes when their content does."""
    found = [(path.absolute(), path.stat()) for path in paths]
    return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]


def stable_names(paths: Sequence[Path]) -> list[str]:
    """A unique name a file, for ids of its tasks, that does not depend on where a data set lies on this machine."""
    absolute = [path.absolute() for path in paths]
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    names = [path.relative_to(common).with_suffix("").as_posix() for path in absolute]
    repeated = [name for name, times in collections.Counter(names).items() if times > 1]
    if repeated:
        raise ConfigError(f"the file {repeated[0]} is named twice; name each file once")
    return names
