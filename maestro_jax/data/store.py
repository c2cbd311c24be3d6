"""Tasks on disk: a TFDS data set in ArrayRecord format, written without TensorFlow. `source.TfdsSource` reads it."""

import collections
import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.types import Task

_SHARD = 10_000  # tasks a file
# What is in memory and goes to TFDS in one call: every call writes the data set's metadata anew.
_AT_A_TIME = 256
_BYTES_AT_A_TIME = 64 << 20


def write_tasks(
    directory: str | os.PathLike[str], name: str, description: str, splits: Mapping[str, Iterable[Task]]
) -> None:
    """Writes the tasks of each split; images go in as they are encoded.

    Args:
      directory: exists; what else is in it stays.
      name: of the data set.
    """
    write_stream(
        directory, name, description, list(splits), ((split, task) for split in splits for task in splits[split])
    )


def write_stream(
    directory: str | os.PathLike[str],
    name: str,
    description: str,
    splits: Sequence[str],
    tasks: Iterable[tuple[str, Task]],
) -> None:
    """As `write_tasks`, for tasks that come with their split, in any order; some are in memory at a time."""
    import tensorflow_datasets as tfds

    texts = tfds.features.Sequence(tfds.features.Text())
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "question": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
            "answers": texts,
            "source": tfds.features.Text(),
            "choices": texts,
            "kind": tfds.features.Text(),
            "grader": tfds.features.Text(),
        }
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, description=description, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=_SHARD, file_format="array_record")
    writer.initialize_splits(list(splits))
    for part in _parts(tasks):
        writer.add_examples(part)
    writer.close_all()


def _parts(tasks: Iterable[tuple[str, Task]]) -> Iterator[dict[str, list[Any]]]:
    """Examples by split, a few at a time."""
    part: dict[str, list[Any]] = collections.defaultdict(list)
    count = size = 0
    for split, task in tasks:
        part[split].append(_example(task))
        count += 1
        size += sum(len(image) for image in task.images)
        if count == _AT_A_TIME or size > _BYTES_AT_A_TIME:
            yield part
            part, count, size = collections.defaultdict(list), 0, 0
    if part:
        yield part


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` to build in, so that moving it there is one step; left where it is, it is removed.

    Raises:
      ConfigError: nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        building.chmod(0o755)  # mkdtemp makes it private
    except OSError as error:
        raise ConfigError(f"cannot write {target.parent}: {error.strerror}; name another directory") from error
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _example(task: Task) -> dict[str, object]:
    return {
        "id": task.id,
        "question": task.question,
        "images": [io.BytesIO(image) for image in task.images],  # a file object is stored as it is
        "answers": list(task.answers),
        "source": task.source,
        "choices": list(task.choices),
        "kind": task.kind,
        "grader": task.grader,
    }
