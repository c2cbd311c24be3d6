"""Image files by path: read from under one declared folder only, never from a URL and never from beside it."""

import dataclasses
import os
from pathlib import Path

from maestro_jax.errors import ConfigError, DataError

MAX_IMAGE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class ImageRoot:
    """The folder that image paths start from; made by `open_root`.

    Attributes:
      folder: resolved, so that what lies under it can be told.
      name: what errors call it, such as "image_root".
    """

    folder: Path
    name: str

    def read(self, path: str, where: str) -> bytes:
        """The bytes of a file that really lies under the folder, whatever `..` or symbolic links say.

        Args:
          path: relative to the folder; untrusted.
          where: what to blame in the error, e.g. "train.parquet row 3, field images[0]".

        Raises:
          DataError: a URL, a path that leads outside, no such file, or one that is too large.
        """
        refuse_url(path, where)
        try:
            resolved = (self.folder / path).resolve()
            if not resolved.is_relative_to(self.folder):
                raise DataError(f"{where}: path {path!r} leads outside {self.name}; correct the path")
            if not resolved.is_file():
                raise DataError(f"{where}: no file {path!r} under {self.name}; correct the path or {self.name}")
            if resolved.stat().st_size > MAX_IMAGE_BYTES:
                raise DataError(
                    f"{where}: file {path!r} has more than {MAX_IMAGE_BYTES >> 20} MiB; scale the image down"
                )
            return resolved.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # unreadable, a NUL in the name, a loop of links
            raise DataError(
                f"{where}: cannot read {path!r} under {self.name}; correct the path or its rights"
            ) from error


def open_root(folder: str | os.PathLike[str], name: str = "image_root") -> ImageRoot:
    """Raises `ConfigError` when `folder` is none."""
    resolved = Path(folder).resolve()
    if not resolved.is_dir():
        raise ConfigError(f"{name} {folder} is not a folder; name the folder that image paths start from")
    return ImageRoot(resolved, name)


def refuse_url(path: str, where: str) -> None:
    if "://" in path:
        raise DataError(f"{where}: path is a URL, which is never fetched; download the image and name the file")
