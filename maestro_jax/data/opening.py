"""Sources by name: what a config says about tasks in, a source of them out."""

from collections.abc import Sequence

from maestro_jax.data.jsonl import JsonlSource
from maestro_jax.data.listed import ListedSource, is_plugin
from maestro_jax.data.source import ChainedSource, TaskSource, TfdsSource
from maestro_jax.data.verl import VerlParquetSource

KINDS = ("tfds", "verl", "jsonl")


def open_source(kind: str, paths: Sequence[str], *, split: str = "train", image_root: str = "") -> TaskSource:
    """The tasks of several files or data sets, behind each other.

    Args:
      kind: one of `KINDS`, or "package.module:name" of a function of the user's (`ListedSource`).
      paths: directories of TFDS data sets, or files; at least one, unless the user's function needs none.
      split: which split of each data set; files have none.
      image_root: folder that image paths in files start from; empty allows inline images only.

    Raises:
      ConfigError, DataError: they cannot be opened.
    """
    if is_plugin(kind):
        return ListedSource(kind, paths, split, image_root)
    if kind == "verl":
        return VerlParquetSource(paths, image_root or None)
    if kind == "jsonl":
        return JsonlSource(paths, image_root or None)
    return ChainedSource([TfdsSource(path, split) for path in paths])
