"""Parameters of a checkpoint, for commands that use what a run has trained: without the rest of the train state."""

from os import PathLike
from typing import Any

import jax
import numpy as np

from maestro_jax.checkpoint.committed import Committed, Damage, committed_steps, file_system
from maestro_jax.checkpoint.store import absolute, named_leaves
from maestro_jax.errors import ConfigError, DataError

_PREFIX = "params/"


class ParamReader:
    """Reads single parameters of a checkpoint as numpy arrays and compares each with its fingerprint.

    Args:
      directory: of checkpoints.
      step: of one of them; None: the newest.

    Raises:
      ConfigError: there is no such checkpoint.
      DataError: of every method, when the checkpoint is damaged.
      CheckpointError: of every method, when the file system fails.
    """

    def __init__(self, directory: str | PathLike[str], step: int | None):
        self._directory = absolute(directory)
        if not self._directory.is_dir():
            raise ConfigError(f"{directory} is no directory; point at a run's work directory or its checkpoints/")
        self._steps = committed_steps(self._directory)
        if not self._steps or (step is not None and step not in self._steps):
            found = ", ".join(map(str, sorted(self._steps))) or "none"
            raise ConfigError(f"{directory} has no checkpoint {'' if step is None else step}; it holds: {found}")
        self.step = self._steps[0] if step is None else step
        try:
            with file_system(self._directory):
                self._saved = Committed(self._directory, self.step)
        except Damage as damage:
            raise self._damaged(damage) from None
        self._names = {_param_name(name): name for name in self._saved.leaves if name.startswith(_PREFIX)}
        self.shapes = {name: self._saved.leaves[whole].shape for name, whole in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """One parameter, in the dtype it was saved in."""
        try:
            with file_system(self._directory):
                return self._saved.read_array(self._names[name])
        except Damage as damage:
            raise self._damaged(damage) from None

    def load(self, abstract: Any, shardings: Any) -> Any:
        """All parameters, each in its shards and in the dtype of `abstract`, a tree of shapes and dtypes.

        Raises:
          ConfigError: the checkpoint holds other parameters than this configuration makes.
        """
        leaves = {_param_name(f"{_PREFIX}{name}"): leaf for name, leaf in named_leaves(abstract).items()}
        for name in sorted(self.shapes.keys() | leaves.keys()):
            found, wanted = self.shapes.get(name), leaves[name].shape if name in leaves else None
            if found != wanted:
                raise ConfigError(
                    f"checkpoint {self._saved.path} holds {name} as {found}, this configuration makes {wanted}; use "
                    "the configuration it was trained with"
                )

        def placed(name: str, leaf: Any, sharding: Any) -> jax.Array:
            whole = self.read(name)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index].astype(leaf.dtype))

        pairs = zip(leaves.items(), jax.tree.leaves(shardings), strict=True)
        return jax.tree.unflatten(jax.tree.structure(abstract), [placed(*leaf, place) for leaf, place in pairs])

    def _damaged(self, damage: Damage) -> DataError:
        before = next((step for step in self._steps if step < self.step), None)
        cure = (
            "and there is none before it" if before is None else f"use the one before, {self._directory / str(before)}"
        )
        return DataError(f"checkpoint {self._directory / str(self.step)} is damaged: {damage}; {cure}")


def _param_name(key: str) -> str:
    return key.removeprefix(_PREFIX).removesuffix("/value")
