"""The pipeline: a source of tasks in, a shuffled, resumable stream of tasks or batches out (Grain).

The order is a function of (seed, position) alone, and the position counts tasks, not batches: a
restored iterator goes on exactly where it stopped, also with another batch size. Reading and checking happen
in Grain's threads, ahead of the training loop.
"""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any, Generic, SupportsIndex, TypeVar

from maestro_jax.data.source import TaskSource
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.images import decode_image
from maestro_jax.types import Task

logger = logging.getLogger(__name__)
T = TypeVar("T")

# How far reading runs ahead: tasks hold encoded images, so this also bounds memory.
READ_THREADS = 2
READ_AHEAD = 32


class _CheckedSource:
    """A source whose damaged rows become None (which Grain skips): each is logged, too many stop the run."""

    def __init__(self, source: TaskSource, damage_limit: int):
        self._source = source
        self._damage_limit = damage_limit
        self._lock = threading.Lock()
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Task | None:
        row = index.__index__()
        try:
            task = self._source[row]
            # Decoded here, in the reading thread, so that a truncated image is found before the step that needs it.
            for number, data in enumerate(task.images):
                decode_image(data, f"task {task.id}, images[{number}]")
            return task
        except DataError as error:
            self._report(row, error)
            return None

    def _report(self, row: int, error: DataError) -> None:
        with self._lock:
            if row in self.damaged:  # met again in a later epoch
                return
            self.damaged.add(row)
            count = len(self.damaged)
        if count > self._damage_limit or count == len(self):
            raise DataError(
                f"{error} ({count} of {len(self)} rows are damaged, at most {self._damage_limit} may be skipped: "
                "repair the data or raise the limit)"
            ) from error
        logger.warning("skipped damaged row %d of at most %d: %s", count, self._damage_limit, error)


class _Stream(Generic[T]):
    """An iterator with a JSON state that refuses the state of other data."""

    def __init__(self, iterator: Any, checked: _CheckedSource, identity: dict[str, Any]):
        self._iterator = iterator
        self._checked = checked
        self._identity = identity

    @property
    def damaged(self) -> int:
        """Damaged rows met since this stream was made."""
        return len(self._checked.damaged)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        """The position and what it is a position in; plain JSON."""
        return {"position": int(self._iterator.get_state()["next_index"]), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the position of `get_state`; raises `ConfigError` when it was made over other data."""
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise ConfigError(
                    f"the saved data position was made with {key}={json.dumps(state.get(key))}, this run has "
                    f"{key}={json.dumps(mine)}; start in a new work directory or restore the old setting"
                )
        self._iterator.set_state({"next_index": state["position"]})


class TaskIterator(_Stream[Task]):
    """Yields tasks one by one; see `task_iterator`."""

    def __next__(self) -> Task:
        return next(self._iterator)


class BatchIterator(_Stream[tuple[Task, ...]]):
    """Yields tuples of `batch_size` tasks; see `Batches`."""

    def __init__(self, iterator: Any, checked: _CheckedSource, identity: dict[str, Any], batch_size: int):
        super().__init__(iterator, checked, identity)
        self._batch_size = batch_size

    def __next__(self) -> tuple[Task, ...]:
        batch = []
        for task in self._iterator:
            batch.append(task)
            if len(batch) == self._batch_size:
                break
        if not batch:
            raise StopIteration
        return tuple(batch)


def task_iterator(
    source: TaskSource, *, seed: int, shuffle: bool = True, epochs: int | None = None, damage_limit: int = 0
) -> TaskIterator:
    """Streams the tasks of a source.

    Args:
      source: where tasks come from.
      seed: of the global shuffle; every epoch has its own order.
      shuffle: whether to shuffle at all (evaluation does not).
      epochs: passes over the data; None goes on for ever.
      damage_limit: how many different damaged rows may be skipped (each is logged).

    Returns:
      An iterator with `get_state` and `set_state` (a JSON-able dict) and the count `damaged`.

    Raises:
      DataError: an empty source now; while iterating, one damaged row too many.
    """
    iterator, checked = _grain_iterator(source, seed, shuffle, epochs, damage_limit)
    return TaskIterator(iterator, checked, _identity(source, seed, shuffle))


class Batches:
    """Batches of tasks, one per training step; each `iter()` starts afresh.

    Batches run across the end of an epoch, so that all have `batch_size` tasks; only the last
    batch of a finite stream may be smaller. Arguments are those of `task_iterator`.
    """

    def __init__(
        self,
        source: TaskSource,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        damage_limit: int = 0,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = epochs
        self._damage_limit = damage_limit

    def __iter__(self) -> BatchIterator:
        iterator, checked = _grain_iterator(self._source, self._seed, self._shuffle, self._epochs, self._damage_limit)
        return BatchIterator(iterator, checked, _identity(self._source, self._seed, self._shuffle), self._batch_size)


def _identity(source: TaskSource, seed: int, shuffle: bool) -> dict[str, Any]:
    return {"tasks": len(source), "seed": seed, "shuffle": shuffle}


def _grain_iterator(
    source: TaskSource, seed: int, shuffle: bool, epochs: int | None, damage_limit: int
) -> tuple[Any, _CheckedSource]:
    if not len(source):
        raise DataError("the data source holds no task; name a file or split that has rows")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"the shuffle seed must be in 0..2^32-1, found {seed}")
    import grain

    checked = _CheckedSource(source, damage_limit)
    dataset = grain.MapDataset.source(checked)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    return iter(dataset.repeat(epochs).to_iter_dataset(options)), checked
