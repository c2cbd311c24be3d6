"""Prepares a published benchmark: files that the user has downloaded in, one TFDS ArrayRecord data set out.

    python -m maestro_jax.data.prepare chartqa --from downloads/ChartQA --to data
    python -m maestro_jax.data.prepare --list

The data set lies in a folder of the benchmark's name under `--to`, with the splits that the benchmark publishes. It is
written beside its place and moved there in one step: what is there is complete. Damaged rows are reported with file
and row; more than `--damage_limit` of them stop the command. Nothing is downloaded.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import flags

from maestro_jax import command
from maestro_jax.data.benchmarks.catalogue import BENCHMARKS, Benchmark
from maestro_jax.data.benchmarks.files import Tasks
from maestro_jax.data.choices import LETTERS
from maestro_jax.data.store import beside, write_stream
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.images import decode_image
from maestro_jax.observe.progress import Progress
from maestro_jax.types import Task

TRAIN, VALIDATION = "train", "validation"
_LINES = 20  # of progress in a log, for each benchmark
_EXAMPLES = 3  # of repeated tasks that are named


def prepare(
    name: str,
    downloads: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    progress: Progress,
    *,
    damage_limit: int = 0,
    validation_share: float = 0.0,
) -> Path:
    """Writes a benchmark's tasks as a data set.

    Args:
      name: a key of `catalogue.BENCHMARKS`.
      downloads: folder with the benchmark's files as published.
      directory: the data set becomes `directory/name`.
      progress: told about every row, and what was found.
      damage_limit: how many damaged rows may be skipped.
      validation_share: part (0 to 1) of a training split without a validation split that becomes one.

    Returns:
      The folder of the data set, for `TfdsSource(folder, split)`.

    Raises:
      ConfigError: an unknown name, a folder that is in the way, or a validation share that cannot be.
      DataError: files that are missing or damaged, or one damaged row too many.
    """
    benchmark = _benchmark(name)
    splits = _open_splits(name, benchmark, Path(downloads))
    names = _split_names(name, splits, validation_share)
    target = Path(directory) / name
    if target.exists():
        raise ConfigError(f"{target} is there already; delete it to prepare {name} again, or name another --to")
    preparation = _Preparation(benchmark, splits, validation_share, damage_limit, progress)
    with beside(target) as building:
        progress.phase(name, total=sum(len(tasks) for tasks in splits.values()))
        write_stream(building, name, f"{benchmark.source}, from {benchmark.publisher}", names, preparation.tasks())
        preparation.report(names)
        os.rename(building, target)
    return target


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name!r}; use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _open_splits(name: str, benchmark: Benchmark, downloads: Path) -> Mapping[str, Tasks]:
    if not downloads.is_dir():
        raise ConfigError(f"--from {downloads} is not a folder; name the one with the files of {name}")
    splits = benchmark.tasks(downloads)
    if not splits:
        raise DataError(
            f"no files of {name} in {downloads}; expected {benchmark.files}; download them from {benchmark.publisher}"
        )
    return splits


def _split_names(name: str, splits: Mapping[str, Tasks], validation_share: float) -> list[str]:
    """The splits that are written."""
    if not validation_share:
        return list(splits)
    if not 0 < validation_share < 1:
        raise ConfigError(f"--validation_share={validation_share} must be between 0 and 1, as 0.05")
    if TRAIN not in splits or VALIDATION in splits:
        raise ConfigError(
            f"--validation_share splits a training set that has no validation set, and {name} has the splits "
            f"{', '.join(splits)}; leave it out"
        )
    return [TRAIN, VALIDATION, *(split for split in splits if split != TRAIN)]


class _Preparation:
    """Tasks on their way from the files to the data set: checked, counted, assigned to splits."""

    def __init__(
        self,
        benchmark: Benchmark,
        splits: Mapping[str, Tasks],
        validation_share: float,
        damage_limit: int,
        progress: Progress,
    ):
        self._benchmark = benchmark
        self._splits = splits
        self._validation_share = validation_share
        self._damage_limit = damage_limit
        self._progress = progress
        self._damaged = 0
        self._counts: dict[str, int] = {}
        self._ids: set[str] = set()
        self._decoded: set[bytes] = set()  # digests of images that are known to be sound
        self._seen: dict[bytes, tuple[str, str]] = {}  # digest of question and images → (split, id)
        self._repeated: dict[tuple[str, str], list[str]] = {}  # (split, earlier split) → "id = id"

    def tasks(self) -> Iterator[tuple[str, Task]]:
        """(split, task) of every sound row."""
        done, total = 0, sum(len(tasks) for tasks in self._splits.values())
        for published, tasks in self._splits.items():
            for found in tasks:
                done += 1
                self._progress.tick(done)
                if done % max(total // _LINES, 1) == 0:
                    self._progress.update(done, {"split": published, "damaged": self._damaged})
                try:
                    task = self._checked(found)
                except DataError as error:
                    self._count_damage(error)
                    continue
                split = self._split(published, task)
                self._counts[split] = self._counts.get(split, 0) + 1
                self._note_repetition(split, task)
                yield split, task

    def report(self, names: Sequence[str]) -> None:
        """Says what was written; raises `DataError` for a split that came out empty."""
        for name in names:
            if not self._counts.get(name):
                cure = "raise --validation_share" if name == VALIDATION else "download its files again"
                raise DataError(f"split {name} of {self._benchmark.source} holds no task; {cure}")
        counts = ", ".join(f"{self._counts[name]} {name}" for name in names)
        self._progress.note(f"{self._benchmark.source}: {counts} tasks; {self._damaged} damaged rows skipped")
        for (split, earlier), pairs in self._repeated.items():
            examples = ", ".join(pairs[:_EXAMPLES])
            self._progress.note(
                f"{len(pairs)} tasks of {split} are in {earlier} too (same question, same images): {examples}"
            )

    def _checked(self, found: tuple[str, Task] | DataError) -> Task:
        """The task, held to the promises that everything later relies on."""
        if isinstance(found, DataError):
            raise found
        where, task = found
        if task.id in self._ids:
            raise DataError(f"{where}: the id {task.id} is used twice; remove one of the rows")
        if task.choices and not all(answer in LETTERS[: len(task.choices)] for answer in task.answers):
            raise DataError(f"{where}: the answer is none of its {len(task.choices)} options; correct the row")
        for position, image in enumerate(task.images):
            digest = hashlib.sha256(image).digest()
            if digest not in self._decoded:  # many questions share an image
                decode_image(image, f"{where}, image {position}")
                self._decoded.add(digest)
        self._ids.add(task.id)
        return task

    def _count_damage(self, error: DataError) -> None:
        self._damaged += 1
        if self._damaged > self._damage_limit:
            raise DataError(
                f"{error} (damaged row {self._damaged}, and --damage_limit={self._damage_limit}: repair the data or "
                "raise the limit)"
            ) from error
        self._progress.note(f"skipped damaged row {self._damaged} of at most {self._damage_limit}: {error}")

    def _split(self, published: str, task: Task) -> str:
        """By the task's id, so that neither order nor the other rows move it between training and validation."""
        if published != TRAIN or not self._validation_share:
            return published
        place = int.from_bytes(hashlib.sha256(task.id.encode()).digest()[:8], "big") / 2**64
        return VALIDATION if place < self._validation_share else TRAIN

    def _note_repetition(self, split: str, task: Task) -> None:
        content = hashlib.sha256(task.question.encode())
        for image in task.images:
            content.update(hashlib.sha256(image).digest())
        earlier, name = self._seen.setdefault(content.digest(), (split, task.id))
        if earlier != split:
            self._repeated.setdefault((split, earlier), []).append(f"{task.id} = {name}")


def table() -> str:
    """What `--list` prints."""
    return "\n\n".join(
        f"{name}: {entry.source}\n  from {entry.publisher}\n  with {entry.files}" for name, entry in BENCHMARKS.items()
    )


def define_flags() -> None:
    """Flags of the command; not defined on import, since importing is no running."""
    flags.DEFINE_string("from", "", "Folder with the benchmark's files as published.")
    flags.DEFINE_string("to", "", "Where prepared data sets are kept, each in a folder of its benchmark's name.")
    flags.DEFINE_integer("damage_limit", 0, "Damaged rows that may be skipped; each is reported.", lower_bound=0)
    flags.DEFINE_float("validation_share", 0.0, "Part of a training split without a validation split that becomes one.")
    flags.DEFINE_bool("list", False, "Print all benchmarks, where their files are and which are needed.")


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    if values.list:
        print(table())
        return
    if len(argv) != 2 or not values["from"].value or not values.to:
        raise ConfigError("use `python -m maestro_jax.data.prepare NAME --from DIR --to DIR`, or --list for the names")
    with Progress() as progress:
        path = prepare(
            argv[1],
            values["from"].value,
            values.to,
            progress,
            damage_limit=values.damage_limit,
            validation_share=values.validation_share,
        )
    print(path)


if __name__ == "__main__":
    define_flags()
    command.run(main, required=(), arguments=1)
