"""A committed checkpoint on disk: what it consists of, whether it is whole, and how its arrays are read.

    12/state/       the arrays by name, as Orbax writes them (OCDBT, zarr)
    12/run/         JSON: format, versions, each array's shape, dtype and fingerprint, facts of the run (`contents`)
    12/MANIFEST     JSON: size of every file and hash of its end; the last to be written before the commit

What Orbax writes when it commits is not read, so it may be damaged: `_CHECKPOINT_METADATA`, and on Google's object
store `commit_success.txt`, which only has to be there.

Only files of arrays are longer than what is hashed of them. They are not read twice: the arrays' fingerprints vouch for
the rest. (Behind the arrays, such a file ends with some hundred bytes of an index that the commit has replaced.)
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from maestro_jax import __version__
from maestro_jax.checkpoint.fingerprint import combined, fingerprint_of, fingerprints, read_through
from maestro_jax.errors import ConfigError, NonFiniteError, UserError

FORMAT = 2  # 1 had neither manifest nor fingerprints
STATE, RUN, MANIFEST = "state", "run", "MANIFEST"
RUN_FILE = "run.json"
HASHED_BYTES = 2**20  # of each file, from its end
_SUCCESS = "commit_success.txt"
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", _SUCCESS)  # by Orbax, when it commits
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# How TensorStore says that a file system fails, in exceptions that are ValueErrors like those of damaged data.
_FAILING = (
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"),
    *("CANCELLED", "os_error_code"),
)


_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Damage(Exception):
    """What is wrong with a checkpoint: the file or array, and how it differs from what was saved."""


class CheckpointError(UserError):
    """Checkpoints cannot be written or read, or none of them is whole."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """An array of a checkpoint, as its `contents` describe it."""

    shape: tuple[int, ...]
    dtype: str
    fingerprint: str


def contents(step: int, state: Mapping[str, jax.Array], run: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a checkpoint of `state`, arrays by name; computes their fingerprints.

    Raises:
      NonFiniteError: an array has a number that is not finite.
    """
    read = read_through(state)
    if spoiled := [name for name, (_, count) in read.items() if count]:
        raise NonFiniteError(
            f"the state of step {step} has numbers that are not finite in {len(spoiled)} of {len(read)} arrays (first "
            f"{', '.join(spoiled[:3])}) and is not saved; the checkpoints before it stay: start from the newest with "
            "other settings, in a new --workdir"
        )
    found = {name: fingerprint for name, (fingerprint, _) in read.items()}
    described = {
        name: {"shape": leaf.shape, "dtype": str(leaf.dtype), "fingerprint": found[name]}
        for name, leaf in state.items()
    }
    return {
        "format": FORMAT,
        "step": step,
        "versions": versions(),
        "fingerprint": combined(found),
        "leaves": described,
        "run": run,
    }


def versions() -> dict[str, str]:
    """Of everything that a checkpoint's content may depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"maestro_jax": __version__, "python": platform.python_version()} | packages


def write_manifest(directory: epath.Path) -> None:
    """Describes all files in a checkpoint's directory. When it returns, they are on disk with all their content."""
    files, directories = {}, {directory}
    for name, path in sorted(_files(directory)):
        if name not in (MANIFEST, *_WRITTEN_LATER):
            size = _size(path)
            files[name] = [size, _hash(path, size)]
            sync(path)
            directories.add(path.parent)
    (directory / MANIFEST).write_text(_manifest_text(files))
    for path in (directory / MANIFEST, *directories):
        sync(path)


def sync(path: epath.Path) -> None:
    """Returns when a file, or what a directory lists, outlives a loss of power; object stores see to that."""
    if _is_object(path):
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _is_object(path: epath.Path) -> bool:
    return "://" in str(path)


def _size(path: epath.Path) -> int:
    """Bytes of a file. For one on disk, epath's own answer includes the owner's name, which not every machine knows."""
    return path.stat().length if _is_object(path) else os.stat(path).st_size


@contextlib.contextmanager
def file_system(directory: epath.Path) -> Iterator[None]:
    """Says that a file system fails, in one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{directory} cannot be read ({line_of(error)}); nothing there was changed: mount it, or mend its "
            "permissions, and start again"
        ) from error


def is_of_file_system(error: BaseException) -> bool:
    """Whether a file system or an object store has failed; TensorStore says so in a ValueError."""
    return isinstance(error, OSError) or isinstance(error, ValueError) and any(sign in str(error) for sign in _FAILING)


def error_number(error: BaseException) -> int | None:
    """The `errno` of a failed file system, or the one that is closest to what an object store says."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if found := re.search(r"os_error_code='(\d+)'", text):
        return int(found[1])
    if "RESOURCE_EXHAUSTED" in text:
        return errno.EDQUOT
    return errno.EACCES if "PERMISSION_DENIED" in text or "UNAUTHENTICATED" in text else None


def line_of(error: BaseException) -> str:
    """A message in one line: its beginning, which says what failed, and its end, which says why."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"


def committed_steps(directory: epath.Path) -> list[int]:
    """Steps with a committed checkpoint, damaged or not, the newest first."""
    if not directory.is_dir():
        return []
    numbered = [path for path in directory.iterdir() if path.name.isdigit()]
    if str(directory).startswith("gs://"):  # Orbax renames nothing there, and commits by a file
        numbered = [path for path in numbered if (path / _SUCCESS).exists()]
    return sorted((int(path.name) for path in numbered), reverse=True)


class Committed:
    """One committed checkpoint. Its files are compared with its manifest here, its arrays when they are read.

    Raises:
      Damage: a file is missing, or is not as it was written.
      ConfigError: it was written by another version of this package, in another format.
      OSError: the file system fails. That says nothing about the checkpoint.
    """

    def __init__(self, directory: epath.Path, step: int):
        self.path = directory / str(step)
        self.step = step
        _check_files(self.path)
        found = json.loads((self.path / RUN / RUN_FILE).read_text())
        if found["format"] != FORMAT:
            raise _other_format(self.path, found["format"])
        self.run: dict[str, Any] = found["run"]
        self.versions: dict[str, str] = found["versions"]
        self.leaves = {
            name: Saved(tuple(leaf["shape"]), leaf["dtype"], leaf["fingerprint"])
            for name, leaf in found["leaves"].items()
        }

    def check_target(self, target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Compares names, shapes and dtypes before anything is read: Orbax pads, cuts or casts silently.

        Raises:
          ConfigError: the configuration makes other arrays than were saved.
        """
        found = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in self.leaves.items()}
        wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in target.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if (one := found.get(name, "nothing")) != (other := wanted.get(name, "nothing")):
                raise ConfigError(
                    f"checkpoint {self.path} holds {one} as {name}, this configuration makes {other}; "
                    "use the configuration it was trained with, or a new --workdir"
                )

    def read_state(self, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """All arrays, in the shardings of `target`. They are not compared with their fingerprints yet."""
        how = ocp.args.StandardRestore(dict(target))
        return _reading(lambda: ocp.StandardCheckpointHandler().restore(self.path / STATE, args=how))

    def check_state(self, state: Mapping[str, jax.Array]) -> None:
        """Compares arrays with their fingerprints; all processes find the same.

        Raises:
          Damage: one differs.
        """
        for name, found in fingerprints(state).items():
            self._check_fingerprint(name, found)

    def read_array(self, name: str) -> np.ndarray:
        """One array as it was saved, in this process's memory."""
        kind = ocp.RestoreArgs(restore_type=np.ndarray)
        how = ocp.args.PyTreeRestore(item={name: 0}, restore_args={name: kind}, partial_restore=True)
        array = _reading(lambda: ocp.PyTreeCheckpointHandler().restore(self.path / STATE, args=how))[name]
        self._check_fingerprint(name, fingerprint_of(array))
        return array

    def _check_fingerprint(self, name: str, found: str) -> None:
        if found != (wanted := self.leaves[name].fingerprint):
            raise Damage(f"{name} has fingerprint {found} instead of {wanted}")


def _check_files(path: epath.Path) -> None:
    """Compares every file with the manifest."""
    try:
        text = (path / MANIFEST).read_text()
        files = json.loads(text)["files"]
    except _ABSENT:
        raise _no_manifest(path) from None
    except (ValueError, KeyError, TypeError):  # of UTF-8, of JSON
        raise Damage(f"{MANIFEST} cannot be read") from None
    if text != _manifest_text(files):
        raise Damage(f"{MANIFEST} is not as it was written")
    for name, (size, wanted) in files.items():
        file = path / name
        try:
            found = _size(file)
            if found != size:
                raise Damage(f"{name} has {found} bytes instead of {size}")
            if _hash(file, size) != wanted:
                raise Damage(f"{name} is not as it was written")
        except _ABSENT:
            raise Damage(f"{name} is missing") from None


def _no_manifest(path: epath.Path) -> Exception:
    """Checkpoints of format 1 had none."""
    try:
        _size(path / RUN / "metadata")
    except _ABSENT:
        return Damage(f"{MANIFEST} is missing")
    return _other_format(path, "1")


def _other_format(path: epath.Path, found: str) -> ConfigError:
    cure = "go on with the version of maestro_jax that wrote it, or use a new --workdir"
    return ConfigError(f"checkpoint {path} has format {found}, this version reads format {FORMAT}; {cure}")


def _reading(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Calls Orbax, whose exceptions are of any kind, and tells damage from a failing file system or memory.

    Raises:
      Damage, OSError, MemoryError: see above.
    """
    try:
        return call()
    except _ABSENT as error:
        raise Damage(line_of(error)) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # Orbax wraps what TensorStore raises
            cause = cause.__cause__
        if any(sign in str(cause) for sign in _FAILING) and "NOT_FOUND" not in str(cause):
            raise OSError(line_of(cause)) from error
        raise Damage(line_of(cause)) from error


def _files(directory: epath.Path, inside: str = "") -> Iterator[tuple[str, epath.Path]]:
    """Names below a directory. (`walk` of epath gives paths of an object store without its scheme.)"""
    for path in directory.iterdir():
        name = inside + path.name
        if path.is_dir():
            yield from _files(path, f"{name}/")
        else:
            yield name, path


def _manifest_text(files: Mapping[str, Any]) -> str:
    """With a hash of its own, and in one spelling only: so no bit of it can change unnoticed."""
    body = json.dumps(files, sort_keys=True)
    own = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return json.dumps({"files": files, "hash": own}, indent=0, sort_keys=True) + "\n"


def _hash(path: epath.Path, size: int) -> str:
    """Of the last `HASHED_BYTES` of a file of `size` bytes."""
    with path.open("rb") as file:
        file.seek(max(0, size - HASHED_BYTES))
        return hashlib.blake2b(file.read(), digest_size=8).hexdigest()
