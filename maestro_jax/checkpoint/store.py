"""Saves and restores a train state with everything a run needs to go on.

Leaves are stored by name ("params/language_model/layers/q_proj/kernel"), so that a checkpoint
does not depend on container classes and restores onto any mesh: shardings come from the target.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from maestro_jax.errors import ConfigError


class CheckpointStore:
    """A directory of numbered checkpoints; writing happens in the background, committed as a whole."""

    def __init__(self, directory: str | Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        # Named here, so that a fresh process can read the metadata of a checkpoint before restoring it.
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
        """Starts saving `state` (a pytree) and `run` (plain JSON); raises if an earlier save failed."""
        self._manager.check_for_errors()
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(named_leaves(state)), run=ocp.args.JsonSave(run))
        )

    def wait(self) -> None:
        """Returns when what is being written is committed; raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """Loads checkpoint `step` into the shape and shardings of `state`, whose arrays are given up for it.

        Raises:
          ConfigError: the checkpoint holds other parameters than this configuration makes.
        """
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named_leaves(state).items()
        }
        self._check(step, target)
        structure = jax.tree.structure(state)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # two states need not fit
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore())
        )
        leaves = [restored.state[name] for name in target]
        return jax.tree.unflatten(structure, leaves), restored.run

    def close(self) -> None:
        """Waits for what is being written; raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()

    def _check(self, step: int, target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Compares names and shapes before anything is read: Orbax pads or cuts silently otherwise."""
        saved = self._manager.item_metadata(step).state
        shapes = {name: tuple(meta.shape) for name, meta in saved.items()}
        for name in sorted(shapes.keys() | target.keys()):
            found, wanted = shapes.get(name), target[name].shape if name in target else None
            if found != wanted:
                raise ConfigError(
                    f"checkpoint {step} in {self._manager.directory} holds {name} as {found}, this configuration makes "
                    f"{wanted}; use the configuration it was trained with, or a new --workdir"
                )


class ParamReader:
    """Reads single parameters of a checkpoint as numpy arrays, without the rest of the train state."""

    def __init__(self, directory: str | Path, step: int | None):
        directory = Path(directory).absolute()
        if not directory.is_dir():
            raise ConfigError(f"{directory} is no directory; point at a run's work directory or its checkpoints/")
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(create=False)
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        steps = self._manager.all_steps()
        if not steps or (step is not None and step not in steps):
            found = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(f"{directory} has no checkpoint {'' if step is None else step}; it holds: {found}")
        self.step = max(steps) if step is None else step
        metadata = self._manager.item_metadata(self.step).state
        self._stored = {_param_name(key): key for key in metadata if key.startswith("params/")}
        self.shapes = {name: tuple(metadata[key].shape) for name, key in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """One parameter, in the dtype it was saved in."""
        key = self._stored[name]
        how = ocp.args.PyTreeRestore(
            item={key: 0}, restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        return self._manager.restore(self.step, args=ocp.args.Composite(state=how)).state[key]

    def load(self, abstract: Any, shardings: Any) -> Any:
        """All parameters, each in its shards and in the dtype of `abstract`, a tree of shapes and dtypes.

        Raises:
          ConfigError: the checkpoint holds other parameters than this configuration makes.
        """
        leaves = {_param_name(f"params/{name}"): leaf for name, leaf in named_leaves(abstract).items()}
        for name in sorted(self.shapes.keys() | leaves.keys()):
            found, wanted = self.shapes.get(name), leaves[name].shape if name in leaves else None
            if found != wanted:
                raise ConfigError(
                    f"checkpoint {self.step} in {self._manager.directory} holds {name} as {found}, this configuration "
                    f"makes {wanted}; use the configuration it was trained with"
                )

        def placed(name: str, leaf: Any, sharding: Any) -> jax.Array:
            whole = self.read(name)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index].astype(leaf.dtype))

        pairs = zip(leaves.items(), jax.tree.leaves(shardings), strict=True)
        return jax.tree.unflatten(jax.tree.structure(abstract), [placed(*leaf, place) for leaf, place in pairs])


def _param_name(key: str) -> str:
    return key.removeprefix("params/").removesuffix("/value")


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Leaves of a pytree by their path, in tree order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
