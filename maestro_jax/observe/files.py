"""Small JSON files of a run, written whole or not at all."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError, DataError, UserError


def write_json(path: str | os.PathLike[str], value: Any, *, sort: bool = True) -> None:
    """Writes JSON through a temporary name, so that a kill leaves the old file or the new one.

    Args:
      sort: whether keys stand in alphabetical order, or in their own.

    Raises:
      UserError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, sort_keys=sort, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())  # else a loss of power may leave the new name without its content
        temporary.replace(path)


def read_json(path: str | os.PathLike[str]) -> Any | None:
    """The file's content, or None where there is no file.

    Raises:
      DataError: it is no JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        cure = "remove it; the command that wrote it writes it again"
        raise DataError(f"{path} is damaged, it is no JSON ({error}); {cure}") from error


def made_directory(name: str, value: str | os.PathLike[str]) -> Path:
    """A directory of results, made if it is not there.

    Args:
      name: what the user calls it, such as "--workdir".

    Raises:
      ConfigError: it cannot be made.
    """
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{name}={value} cannot be created ({error.strerror}); name another directory") from error
    return Path(value)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line that a file cannot be written."""
    try:
        yield
    except OSError as error:
        cure = f"{disk_cure(error.errno)}, and start the same command again"
        raise UserError(f"{path} cannot be written ({error.strerror}); {cure}") from error


def disk_cure(number: int | None) -> str:
    """What helps where a file system fails with this `errno`; more of the sentence may follow."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free its disk, or raise its quota"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable for this user"
    return "see that its disk is mounted and whole"
