"""Tasks on disk: a TFDS data set in ArrayRecord format, written without TensorFlow. `source.TfdsSource` reads it."""

import io
import itertools
import os
from collections.abc import Iterable, Mapping

from maestro_jax.types import Task

_SHARD = 10_000  # tasks a file
_AT_A_TIME = 64  # tasks in memory


def write_tasks(
    directory: str | os.PathLike[str], name: str, description: str, splits: Mapping[str, Iterable[Task]]
) -> None:
    """Writes the tasks of each split; images go in as they are encoded.

    Args:
      directory: exists; what else is in it stays.
      name: of the data set.
    """
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
        }
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(directory), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, description=description, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=_SHARD, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, tasks in splits.items():
        tasks = iter(tasks)
        while part := list(itertools.islice(tasks, _AT_A_TIME)):
            writer.add_examples({split: [_example(task) for task in part]})
    writer.close_all()


def _example(task: Task) -> dict[str, object]:
    return {
        "id": task.id,
        "question": task.question,
        "images": [io.BytesIO(image) for image in task.images],  # a file object is stored as it is
        "answers": list(task.answers),
        "source": task.source,
        "choices": list(task.choices),
        "kind": task.kind,
    }
