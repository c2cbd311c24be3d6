"""JSONL as a source of tasks: one JSON object a line, for questions that are at hand in no other form.

    {"question": "How many?", "images": ["a/1.png"], "answers": ["3"], "source": "TallyQA"}
    {"question": "Which?", "images": [{"bytes": "iVBORw0..."}], "answers": ["B"], "choices": ["cat", "dog"],
     "source": "pets", "kind": "animals", "id": "pets/7", "grader": "strict"}

`images` are paths under one declared folder or base64 bytes, never URLs; they may be left out. `answers` is a list of
accepted answers or a single one. With `choices` the answer is a letter or the text of an option, and the options are
shown below the question, which leaves them out. `source` selects the grader, unless `grader` names
another one. `choices`, `kind`, `grader` and `id` may be left out; fields of other names are ignored.
"""

import base64
import binascii
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maestro_jax.data.choices import LETTERS, letter_of, with_options
from maestro_jax.data.roots import MAX_IMAGE_BYTES, ImageRoot, open_root, refuse_url
from maestro_jax.data.rows import Row, describe
from maestro_jax.data.source import Label, file_stamps, stable_names
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.images import check_image
from maestro_jax.types import Task

FIELDS = ("question", "images", "answers", "source", "choices", "kind", "grader", "id")
MAX_LINE_BYTES = 4 * MAX_IMAGE_BYTES


@dataclasses.dataclass(frozen=True)
class _File:
    """Where the lines that are not blank lie: number (from 1), first byte, length in bytes."""

    path: Path
    name: str
    lines: np.ndarray  # int64 [lines, 3]


class JsonLines:
    """The lines of JSONL files that are not blank, read one at a time.

    Args:
      paths: one file or several; their lines follow each other.

    Raises:
      DataError: a file that is missing or has too long a line; on reading, a line that is no JSON object.
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]):
        listed = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
        if not listed:
            raise ConfigError("no JSONL file is named; give at least one path")
        names = stable_names(listed)
        self._files = [_File(path, name, _find_lines(path)) for path, name in zip(listed, names, strict=True)]
        self._starts = np.cumsum([0, *(len(file.lines) for file in self._files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> tuple[Row, str]:
        """A line, and a name for it that stays."""
        file, row = self._find(index)
        line, offset, length = (int(value) for value in file.lines[row])
        where = self.where(index)
        with open(file.path, "rb") as opened:  # a file for each read: sources are used from several threads
            opened.seek(offset)
            data = opened.read(length)
        return Row(_parse(data, where), where, line), f"{file.name}/{line:06d}"

    def where(self, index: int) -> str:
        file, row = self._find(index)
        return f"{file.path} line {int(file.lines[row][0])}"

    def texts(self) -> Iterator[tuple[bytes, str, str]]:
        """Every line as it is, where it stands, and its name."""
        for file in self._files:
            with open(file.path, "rb") as opened:
                for line, offset, length in file.lines.tolist():
                    opened.seek(offset)
                    yield opened.read(length), f"{file.path} line {line}", f"{file.name}/{line:06d}"

    def stamps(self) -> list[Any]:
        return file_stamps(file.path for file in self._files)

    def _find(self, index: int) -> tuple[_File, int]:
        """File of a task, and which of its lines that are not blank."""
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[number], index - int(self._starts[number])


class JsonlSource:
    """Tasks from JSONL files; arguments and errors as of `JsonLines`.

    Args:
      image_root: folder that image paths start from; None allows inline images only.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        image_root: str | os.PathLike[str] | None = None,
    ):
        self._lines = JsonLines(paths)
        self._image_root = None if image_root is None else open_root(image_root)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Task:
        return _task(*self._lines.read(index), self._image_root)

    def where(self, index: int) -> str:
        return self._lines.where(index)

    def labels(self) -> Iterator[Label | None]:
        return (_label(*line) for line in self._lines.texts())

    def stamp(self) -> list[Any]:
        return ["jsonl", str(self._image_root), *self._lines.stamps()]


def _find_lines(path: Path) -> np.ndarray:
    lines, number, offset = [], 0, 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path} line {number} has more than {MAX_LINE_BYTES >> 20} MiB; name its images by path"
                    )
                if line.strip():
                    lines.append((number, offset, len(line)))
                offset += len(line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    return np.array(lines, np.int64).reshape(-1, 3)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a text that is not UTF-8
        raise DataError(f"{where}: not JSON ({str(error)[:80]}); write one JSON object a line, in UTF-8") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected a JSON object, found {describe(values)}; write one object a line")
    return values


def _label(line: bytes, where: str, name: str) -> Label | None:
    try:
        row = Row(_parse(line, where), where, 0)
        return Label(_id(row, name), row.text("source"), _optional(row, "grader"))
    except DataError:
        return None


def _id(row: Row, name: str) -> str:
    return row.text("id") if row.has("id") else name


def _optional(row: Row, field: str) -> str:
    return row.text(field) if row.has(field) else ""


def _task(row: Row, name: str, image_root: ImageRoot | None) -> Task:
    row.refuse_misspelt(FIELDS)
    choices = row.texts("choices") if row.has("choices") else ()
    answers = row.scalars("answers")
    return Task(
        id=_id(row, name),
        question=with_options(row.text("question"), choices),
        images=_images(row, image_root),
        answers=(_letter(row, answers, choices),) if choices else answers,
        source=row.text("source"),
        choices=choices,
        kind=_optional(row, "kind"),
        grader=_optional(row, "grader"),
    )


def _letter(row: Row, answers: tuple[str, ...], choices: tuple[str, ...]) -> str:
    if not 2 <= len(choices) <= len(LETTERS):
        raise row.error("choices", f"expected 2 to {len(LETTERS)} options, found {len(choices)}; correct the list")
    letters = {letter_of(answer, choices) for answer in answers}
    letter = letters.pop()
    if letter is None or letters:
        raise row.error(
            "answers", f"expected the letter or the text of one of the {len(choices)} choices; correct the answer"
        )
    return letter


def _images(row: Row, image_root: ImageRoot | None) -> tuple[bytes, ...]:
    images = []
    for position, entry in enumerate(row.values("images", list) if row.has("images") else ()):
        images.append(read_image(row, f"images[{position}]", entry, image_root))
    return tuple(images)


def read_image(row: Row, field: str, entry: Any, image_root: ImageRoot | None) -> bytes:
    """The encoded image that `entry` names or holds, judged by its header."""
    data = _image_bytes(row, field, entry, image_root)
    check_image(data, f"{row.where}, field {field}")
    return data


def _image_bytes(row: Row, field: str, entry: Any, image_root: ImageRoot | None) -> bytes:
    if isinstance(entry, str):
        refuse_url(entry, f"{row.where}, field {field}")
        if image_root is None:
            raise row.error(field, "is a path; set image_root to the folder that paths start from")
        return image_root.read(entry, f"{row.where}, field {field}")
    if isinstance(entry, dict) and isinstance(entry.get("bytes"), str):
        try:
            return base64.b64decode(entry["bytes"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise row.error(field, "bytes are not base64; encode the image file with base64") from error
    raise row.error(field, f'expected a path or {{"bytes": base64}}, found {describe(entry)}; correct the line')
