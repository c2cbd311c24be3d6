"""Saves and restores a train state with everything a run needs to go on.

Leaves are stored by name ("params/language_model/layers/q_proj/kernel"), so that a checkpoint
does not depend on container classes and restores onto any mesh: shardings come from the target.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, TypeVar

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from maestro_jax import failpoints
from maestro_jax.checkpoint.committed import (
    RUN,
    RUN_FILE,
    STATE,
    CheckpointError,
    Committed,
    Damage,
    committed_steps,
    contents,
    error_number,
    file_system,
    is_of_file_system,
    line_of,
    sync,
    write_manifest,
)
from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import disk_cure
from maestro_jax.parallel.cluster import LostError, is_loss, several

T = TypeVar("T")
_MESSAGE_BYTES = 512


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      state: in the structure and the shardings of the state it was restored for.
      run: as it was given to `save`.
    """

    step: int
    state: Any
    run: dict[str, Any]


class CheckpointStore:
    """A directory of numbered checkpoints; writing happens in the background, committed as a whole.

    With several processes, all of them make the same calls.

    Args:
      directory: a local path, or one of an object store ("gs://bucket/run").
      keep: so many of the newest stay; 0: all.
      keep_every: a checkpoint of a step that this divides stays for good; 0: none.
      note: receives a line for every damaged checkpoint.
      anew: what the user can do where no checkpoint is whole.

    Raises:
      CheckpointError: of every method, when the file system fails.
      LostError: of every method, when another process is gone.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        keep: int,
        keep_every: int = 0,
        note: Callable[[str], None] = print,
        anew: str = "start again with a new --workdir",
    ):
        self.directory = absolute(directory)
        self._note, self._anew = note, anew
        self._closed = False
        self._saving: int | None = None  # the step that was saved last, perhaps still in the background
        # Directories are made before `save` returns: what waits for one that cannot be made holds up the process's exit
        # for five minutes.
        in_background = ocp.options.AsyncOptions(
            post_finalization_callback=self._before_commit,
            create_directories_asynchronously=False,
            barrier_sync_fn=_barrier,
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None,
            keep_period=keep_every or None,
            cleanup_tmp_directories=True,  # of saves that a kill ended
            async_options=in_background,
        )
        logging.getLogger("absl").addFilter(_not_of_orbax)
        handlers = {STATE: ocp.StandardCheckpointHandler(), RUN: ocp.JsonCheckpointHandler(filename=RUN_FILE)}
        with file_system(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> None:
        """Starts saving `state` (a pytree) and `run` (plain JSON); returns when `state` may change.

        Raises:
          CheckpointError: this save or an earlier one failed.
          NonFiniteError: `state` is not finite; nothing was written.
        """
        named = named_leaves(state)
        described = contents(step, named, run)
        json.dumps(described)  # what is no JSON is an error here, not in the background
        self.wait()
        self._saving = step
        what = ocp.args.Composite(**{STATE: ocp.args.StandardSave(named), RUN: ocp.args.JsonSave(described)})
        with self._writing():
            self._manager.save(step, args=what, force=True)

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; does not wait for it."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that was being saved is committed."""
        with self._writing():
            self._manager.wait_until_finished()
            if self._saving is not None:
                sync(self.directory)  # its new name

    def close(self) -> None:
        """Waits for what is being written; more than once does no harm."""
        if not self._closed:
            self._closed = True
            self.wait()
            self._manager.close()

    def latest(self) -> int | None:
        """The newest committed step, damaged or not."""
        return max(self._manager.all_steps(), default=None)

    def restore_newest(self, state: Any) -> Restored | None:
        """Loads the newest checkpoint that is whole into the shape and shardings of `state`; None if there is none.

        The arrays of `state` are given up for it. Damaged checkpoints that are newer are renamed, such as to
        `12.damaged`, and reported. If none is whole, none is renamed: then it may be the reader that is broken.

        Raises:
          ConfigError: a checkpoint holds other arrays than this configuration makes.
          CheckpointError: all checkpoints are damaged.
        """
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named_leaves(state).items()
        }
        damaged: dict[int, str] = {}
        with file_system(self.directory):
            steps = _from_first_process(committed_steps(self.directory))
            for step in steps:
                try:
                    restored = self._restore(step, state, target)
                except Damage as damage:
                    # Not the exception: its frames hold arrays, and those of the next checkpoint need their memory.
                    damaged[step] = str(damage)
                    continue
                self._set_aside(damaged, step)
                return restored
        if damaged:
            each = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            raise CheckpointError(
                f"{self.directory} has no checkpoint that is whole ({each}); bring one back from a backup, or "
                f"{self._anew}"
            )
        return None

    def _restore(self, step: int, state: Any, target: Mapping[str, jax.ShapeDtypeStruct]) -> Restored:
        """Raises Damage, in all processes where one finds it."""
        found = _in_all_processes(functools.partial(Committed, self.directory, step))
        found.check_target(target)
        jax.tree.map(lambda leaf: leaf.delete(), state)  # two states need not fit
        arrays = _in_all_processes(functools.partial(found.read_state, target))
        found.check_state(arrays)
        leaves = [arrays[name] for name in target]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(state), leaves), found.run)

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        for step, damage in damaged.items():
            name = _in_all_processes(functools.partial(self._rename, step))
            self._note(
                f"checkpoint {self.directory / str(step)} is damaged: {damage}; it is now called {name} and may be "
                f"deleted, the run goes on from step {used}"
            )
        if damaged:
            self._manager.reload()

    def _rename(self, step: int) -> str:
        """What a damaged checkpoint is called from now on; the first process renames it."""
        name = f"{step}.damaged"
        if jax.process_index() == 0:
            while (self.directory / name).exists():
                name += "+"
            (self.directory / str(step)).rename(self.directory / name)
        return name

    def _before_commit(self) -> None:
        """Called in the background by the first process when all files are written."""
        temporary = f"{self._saving}.orbax-checkpoint-tmp"  # with a suffix in older versions of Orbax
        unfinished = [path for path in self.directory.iterdir() if path.name.startswith(temporary)]
        # On an object store nothing is renamed: files are at their place from the beginning.
        write_manifest(unfinished[0] if unfinished else self.directory / str(self._saving))
        failpoints.reach("in_commit")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:  # TensorStore's are ValueErrors
            if several() and (is_loss(error) or _is_missed(error)):
                raise LostError(f"another process was lost while step {self._saving} was being saved") from error
            if not is_of_file_system(error):
                raise  # a fault of ours, or of the devices: no disk is to blame
            raise CheckpointError(
                f"the checkpoint of step {self._saving} cannot be written to {self.directory} ({line_of(error)}); "
                f"{disk_cure(error_number(error))} and start the run again: it goes on from the checkpoint before"
            ) from error


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes; not where this one's save has failed.

    Orbax meets the others at the end of a save, failed or not. Where it failed in some processes only, those would be
    waited for, and wait, for all of the 20 minutes that a save may take.
    """
    in_background = threading.current_thread() is not threading.main_thread()
    if not (in_background and sys.exc_info()[1] is not None):
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _is_missed(error: BaseException) -> bool:
    """Whether this is how Orbax says that a barrier failed."""
    return isinstance(error, TimeoutError) and isinstance(error.__cause__, jax.errors.JaxRuntimeError)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a failure several times, each with all frames, before it raises it; then we say it in one line."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def absolute(directory: str | PathLike[str]) -> epath.Path:
    """The path as Orbax wants it: absolute.

    Raises:
      ConfigError: it is on an object store, and the package that reads that one is not installed.
    """
    path = epath.Path(directory)
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return epath.Path(path.absolute())
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        cure = "pip install 'maestro_jax[gcs]'" if scheme == "gs" else str(error)
        raise ConfigError(f"{path} cannot be read, for the package of {scheme}:// is not installed; {cure}") from error
    return path


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Leaves of a pytree by their path, in tree order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _from_first_process(steps: list[int]) -> list[int]:
    """The list of the first process: others may look while it renames."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.zeros(count, np.int32)
    if jax.process_index() == 0:
        mine[:] = steps
    return multihost_utils.broadcast_one_to_all(mine).tolist()


def _in_all_processes(call: Callable[[], T]) -> T:
    """Calls it on every process; damage that one of them finds is raised on all."""
    result, problem = None, ""
    try:
        result = call()
    except Damage as damage:
        problem = str(damage)
    if jax.process_count() > 1:
        mine = np.frombuffer(problem.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
        found = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(mine))
        problem = next(filter(None, found), "")
    if problem:
        raise Damage(problem)
    return result  # type: ignore[return-value]
