"""The pipeline: a source of tasks in, a shuffled, resumable stream of batches out (Grain).

The order is a function of (seed, position) alone, and positions count the tasks of all processes, not batches: a
restored stream goes on exactly where it stopped, also with another batch size or number of processes. Reading and
preparing (images decoded and cut, once) happen in Grain's threads, one batch ahead of the step that takes it.
"""

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, SupportsIndex, TypeVar

from maestro_jax.data.mixture import Mixture, source_at
from maestro_jax.data.order import Consumed, Share
from maestro_jax.data.source import TaskSource
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.images import decode_image
from maestro_jax.types import Task

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Decoding and resizing leave Python's lock to others, so threads are enough; each holds one decoded image.
READ_THREADS = min(os.cpu_count() or 1, 8)


def check_task(task: Task) -> Task:
    """The task as it is; raises `DataError` when an image of it cannot be decoded."""
    for number, data in enumerate(task.images):
        decode_image(data, f"task {task.id}, images[{number}]")
    return task


@dataclasses.dataclass(frozen=True)
class _Damage:
    """In place of a task: what is wrong with its row."""

    where: str
    reason: str


class _Reader(Generic[T]):
    """Prepared tasks by row, read in Grain's threads."""

    def __init__(self, source: TaskSource, prepare: Callable[[Task], T], prefix: str):
        self._source = source
        self._prepare = prepare
        self._prefix = prefix

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> T | _Damage:
        row = index.__index__()
        try:
            task = self._source[row]
            if self._prefix:
                task = dataclasses.replace(task, id=self._prefix + task.id)
            return self._prepare(task)
        except DataError as error:
            # The text alone: an exception would keep what was decoded in memory.
            return _Damage(self._source.where(row), str(error))


class Batches(Generic[T]):
    """Batches of tasks, one per training step; each `iter()` starts afresh.

    Batches run across the end of an epoch, so that all have the same size; only the last batch of a finite stream may
    be smaller.

    Args:
      source: where tasks come from; from a `Mixture`, in its shares (ids then begin with the number of their source).
      batch_size: tasks of a batch, over all processes.
      prepare: what becomes of a task before it is handed out; called in threads. `DataError` marks a damaged row.
      seed: of the global shuffle; every epoch of every source has its own order.
      shuffle: whether to shuffle at all.
      epochs: passes over the data; None goes on for ever, and so must a mixture.
      damage_limit: how many different damaged rows a process may skip (each is logged).
      process_index, process_count: whose part of each batch this is. The parts of all processes, one behind the other,
        are the batches of a single one, up to damaged rows: each process skips its own.

    Raises:
      ConfigError: an argument out of range.
      DataError: an empty source; while iterating, one damaged row too many.
    """

    def __init__(
        self,
        source: TaskSource,
        batch_size: int,
        prepare: Callable[[Task], T] = check_task,  # type: ignore[assignment]
        *,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        damage_limit: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= seed < 2**32:
            raise ConfigError(f"the shuffle seed must be in 0..2^32-1, found {seed}")
        self._mixture = source if isinstance(source, Mixture) else Mixture([source], [1])
        if epochs is not None and len(self._mixture.sources) > 1:
            raise ConfigError("a mixture has no epochs, its sources end one by one; leave epochs=None")
        for number, part in enumerate(self._mixture.sources):
            if not len(part):
                raise DataError(f"data source {number} holds no task; name a file or split that has rows")
        self._share = Share(batch_size, process_index, process_count)
        self._prepare = prepare
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = epochs
        self._damage_limit = damage_limit

    def __iter__(self) -> "BatchIterator[T]":
        import grain

        share, sources = self._share, self._mixture.sources
        parts = [self._part(number) for number in range(len(sources))]
        total = sys.maxsize if self._epochs is None else len(self._mixture) * self._epochs
        order = _dealt(share, self._mixture.weights, total)
        dataset = grain.MapDataset.select_from_datasets(parts, order)
        ahead = max(share.part, READ_THREADS)
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=ahead)
        identity = {
            "tasks": [len(source) for source in sources],
            "weights": list(self._mixture.weights),
            "seed": self._seed,
            "shuffle": self._shuffle,
        }
        skipping = _Skipping(self._damage_limit, len(self._mixture))
        return BatchIterator(iter(dataset.to_iter_dataset(options)), share, total, identity, skipping)

    def _part(self, number: int) -> Any:
        """A source of the mixture as an endless (or finite) shuffled data set."""
        import grain

        several = len(self._mixture.sources) > 1
        reader = _Reader(self._mixture.sources[number], self._prepare, f"{number}/" if several else "")
        dataset = grain.MapDataset.source(reader)
        if self._shuffle:
            dataset = dataset.shuffle(seed=_seed_of(self._seed, number))
        return dataset.repeat(self._epochs)


def _seed_of(seed: int, number: int) -> int:
    """The first source has the run's seed, others one of their own: equal lengths would have equal orders."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _dealt(share: Share, weights: tuple[int, ...], total: int) -> Any:
    """Grain's map from the number of a process's task to its source and the number within it."""
    import grain

    class Dealt(grain.transforms.DatasetSelectionMap):
        def __len__(self) -> int:
            return share.count(total)

        def __getitem__(self, index: int) -> tuple[int, int]:
            return source_at(share.position(index), weights)

    return Dealt()


@dataclasses.dataclass
class _Skipping:
    """Damaged rows of a stream, counted where it is consumed, so that threads have no say in it."""

    limit: int
    rows: int  # of all sources
    met: set[str] = dataclasses.field(default_factory=set)
    in_a_row: int = 0

    def skip(self, damage: _Damage) -> None:
        """Logs a row the first time; raises `DataError` on one too many, or when nothing but damage is left."""
        self.in_a_row += 1
        new = damage.where not in self.met
        self.met.add(damage.where)
        count = len(self.met)
        # Where the reason is a file's own, it begins with the place.
        reason = damage.reason if damage.where in damage.reason else f"{damage.where}: {damage.reason}"
        if count > self.limit or self.in_a_row >= self.rows:
            raise DataError(
                f"{reason} ({count} of {self.rows} rows are damaged, at most {self.limit} may be skipped: "
                "repair the data or raise the limit)"
            )
        if new:
            logger.warning("skipped damaged row %d of at most %d: %s", count, self.limit, reason)


class BatchIterator(Iterator[tuple[T, ...]]):
    """Yields tuples of prepared tasks; its JSON state refuses other data. See `Batches`."""

    def __init__(self, tasks: Any, share: Share, total: int, identity: dict[str, Any], skipping: _Skipping):
        self._tasks = tasks
        self._share = share
        self._total = total
        self._identity = identity
        self._skipping = skipping
        self._began = Consumed(0)  # where this iterator began, and the batches since
        self._batches = 0

    @property
    def damaged(self) -> int:
        """Different damaged rows that were skipped since the iterator was made."""
        return len(self._skipping.met)

    def __next__(self) -> tuple[T, ...]:
        batch: list[T] = []
        while len(batch) < self._share.part:
            try:
                task = next(self._tasks)
            except StopIteration:
                break
            if self._share.position(self._index() - 1) in self._began.beyond:
                continue
            if isinstance(task, _Damage):
                self._skipping.skip(task)
                continue
            self._skipping.in_a_row = 0
            batch.append(task)
        if not batch:
            raise StopIteration
        self._batches += 1
        return tuple(batch)

    def get_state(self) -> dict[str, Any]:
        """What is consumed, and of what; plain JSON.

        With several processes, `order.merge_states` makes one state of all theirs, which any number of processes can
        set. A process's own is enough to go on with the same number of processes, or where no row is damaged.
        """
        # Every process has had as many batches as this one.
        position = min(self._began.position + self._batches * self._share.block, self._total)
        own = range(self._share.count(position), self._index())
        consumed = Consumed.of(position, (*self._began.beyond, *map(self._share.position, own)))
        return {"position": consumed.position, "beyond": list(consumed.beyond), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the position of `get_state`; raises `ConfigError` when it was made over other data."""
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise ConfigError(
                    f"the saved data position was made with {key}={json.dumps(state.get(key))}, this run has "
                    f"{key}={json.dumps(mine)}; start in a new work directory or restore the old setting"
                )
        self._began = Consumed(state["position"], tuple(state["beyond"]))
        self._batches = 0
        self._tasks.set_state({"next_index": self._share.count(self._began.position)})

    def _index(self) -> int:
        """The number of this process's next task."""
        return int(self._tasks.get_state()["next_index"])
