"""Saves and restores a train state with everything a run needs to go on.

Leaves are stored by name ("params/language_model/layers/q_proj/kernel"), so that a checkpoint
does not depend on container classes and restores onto any mesh: shardings come from the target.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
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

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def restore(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        """Loads checkpoint `step` into the shape and shardings of `state`, whose values are not used.

        Raises:
          ConfigError: the checkpoint holds other parameters than this configuration makes.
        """
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named_leaves(state).items()
        }
        self._check(step, target)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore())
        )
        leaves = [restored.state[name] for name in target]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), restored.run

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


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Leaves of a pytree by their path, in tree order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
