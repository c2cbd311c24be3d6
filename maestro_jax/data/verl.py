"""verl parquet files as a source of tasks: what RL users of PyTorch frameworks have, read as it is.

A row holds `data_source`, `prompt` [{role, content}], `ability`, `extra_info` {answer, index,
question, split}, `images` [{bytes, path}] and `reward_model` {style, ground_truth}. Question,
images, answers and choices are taken from it; its system prompt is not (the registry prompt is ours).
`extra_info.grader` names the grader of a row, where `data_source` is not to.
Rows are untrusted: images come inline or from under one declared folder, never from a URL.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache

from maestro_jax.data.choices import letter_of, split_options, with_options
from maestro_jax.data.roots import ImageRoot, open_root, refuse_url
from maestro_jax.data.rows import describe
from maestro_jax.data.source import Label, file_stamps, stable_names
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.images import check_image
from maestro_jax.types import Task

PLACEHOLDER = "<image>"
COLUMNS = ("data_source", "prompt", "extra_info", "images", "reward_model")
REQUIRED = ("data_source", "images", "reward_model")
# Row groups are decompressed whole; a shuffle jumps between them, so as many as fit here stay in memory.
CACHE_BYTES = 1 << 30


class VerlParquetSource:
    """Tasks from verl parquet files, read one row group at a time.

    Args:
      paths: one file or several; their rows follow each other.
      image_root: folder that rows with an image path (and no bytes) refer to.
      cache_bytes: how much decompressed data stays in memory (at least one row group does).

    Raises:
      DataError: a file that is missing, damaged, or not of this schema; on reading, a bad row.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        image_root: str | os.PathLike[str] | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ):
        listed = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not listed:
            raise ConfigError("no parquet file is named; give at least one path")
        self._paths = [Path(path) for path in listed]
        self._image_root = None if image_root is None else open_root(image_root)
        self._names = stable_names(self._paths)
        self._files = [_open(path) for path in self._paths]
        # One entry a row group: (file, group in the file, first row in the file).
        self._groups = [
            (file, group, first) for file, opened in enumerate(self._files) for group, first in _group_starts(opened)
        ]
        sizes = [self._files[file].metadata.row_group(group).num_rows for file, group, _ in self._groups]
        self._starts = np.cumsum([0, *sizes])
        # One that is larger than all that may stay is the only one that does.
        self._cache: LRUCache[int, Any] = LRUCache(cache_bytes, getsizeof=lambda table: min(table.nbytes, cache_bytes))
        self._lock = threading.Lock()  # a ParquetFile is one open file with one position

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Task:
        number, offset = self._find(index)
        file, _, first = self._groups[number]
        where = self.where(index)
        try:
            row = self._group(number).slice(offset, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: a text is not UTF-8; re-export the file") from error
        return _task(row, self._name(file, first + offset), where, self._image_root)

    def where(self, index: int) -> str:
        number, offset = self._find(index)
        file, _, first = self._groups[number]
        return f"{self._paths[file]} row {first + offset}"

    def labels(self) -> Iterator[Label | None]:
        for file, group, first in self._groups:
            graders = self._column(file, group, "extra_info", "grader")
            for row, source in enumerate(self._column(file, group, "data_source")):
                yield Label(self._name(file, first + row), source, graders[row] or "") if source else None

    def stamp(self) -> list[Any]:
        return ["verl", str(self._image_root), *file_stamps(self._paths)]

    def _name(self, file: int, row: int) -> str:
        return f"{self._names[file]}/{row:06d}"

    def _column(self, file: int, group: int, name: str, field: str = "") -> list[str | None]:
        """A column of texts of a row group, or a field of one; None for what is not there or cannot be read."""
        import pyarrow as pa

        nothing: list[str | None] = [None] * self._files[file].metadata.row_group(group).num_rows
        schema = self._files[file].schema_arrow
        if field and (name not in schema.names or not _has_field(schema.field(name).type, field)):
            return nothing
        try:
            with self._lock:
                table = self._files[file].read_row_group(group, columns=[f"{name}.{field}" if field else name])
        except (pa.ArrowException, OSError):
            return nothing
        return [_text(value[field] if field and value.is_valid else value) for value in table.column(0)]

    def _find(self, index: int) -> tuple[int, int]:
        """Row group of a task, and its row within that."""
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _group(self, number: int) -> Any:
        """The table of a row group, from the cache of the most recently used ones."""
        import pyarrow as pa

        with self._lock:
            if (known := self._cache.get(number)) is not None:
                return known
            file, group, first = self._groups[number]
            columns = [name for name in self._files[file].schema_arrow.names if name in COLUMNS]
            try:
                table = self._files[file].read_row_group(group, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"cannot read {self._paths[file]}: row group {group} (from row {first}) is damaged or too large; "
                    "re-download it, or re-export it with smaller row groups"
                ) from error
            self._cache[number] = table
            return table


def _has_field(kind: Any, field: str) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind) and kind.get_field_index(field) >= 0)


def _text(value: Any) -> str | None:
    """The text of a value of an Arrow column, unless it is none."""
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return None
    return text if isinstance(text, str) else None


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"cannot read {path}: no such file; check the path")
    try:
        opened = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: not a complete parquet file; re-download or re-export it") from error
    for column in REQUIRED:
        if column not in opened.schema_arrow.names:
            raise DataError(
                f"cannot read {path}: column {column} is missing; "
                f"re-export it in the verl schema ({', '.join(COLUMNS)})"
            )
    return opened


def _group_starts(opened: Any) -> list[tuple[int, int]]:
    """(row group, its first row in the file) of every row group that holds rows."""
    starts, first = [], 0
    for group in range(opened.metadata.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        if rows:
            starts.append((group, first))
        first += rows
    return starts


def _task(row: dict[str, Any], name: str, where: str, image_root: ImageRoot | None) -> Task:
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise DataError(f"{where}, field data_source: expected a text, found {describe(source)}; re-export the row")
    images = _images(row.get("images"), where, image_root)
    answers = _answers(row.get("reward_model"), where)
    question, choices = _choices(row, _question(row, where, len(images)), answers, where)
    return Task(
        id=name,
        question=question,
        images=images,
        answers=answers,
        source=source,
        choices=choices,
        grader=_grader(row.get("extra_info"), where),
    )


def _grader(info: Any, where: str) -> str:
    """`extra_info.grader`; exporters fill what a row lacks with nothing or an empty text."""
    found = info.get("grader") if isinstance(info, dict) else None
    if found is not None and not isinstance(found, str):
        raise DataError(
            f"{where}, field extra_info.grader: expected the name of a grader, found {describe(found)}; correct it"
        )
    return found or ""


def _choices(row: dict[str, Any], question: str, answers: tuple[str, ...], where: str) -> tuple[str, tuple[str, ...]]:
    """The question as it is shown, with its options if it is multiple choice.

    Options are the list `extra_info.choices` (or `options`), else those that the question itself shows ("A. text"),
    if the answers point to one of them. The paper's repository writes the latter, with the answers [letter, text of the
    option] (jinyangwu/Maestro, verl_tool/workers/reward_manager/reward_score/msearthmcq.py).
    """
    info = row.get("extra_info")
    listed = (info.get("choices") or info.get("options")) if isinstance(info, dict) else None
    _, shown = split_options(question)
    if listed is None:
        letters = {letter_of(answer, shown) for answer in answers}
        return question, shown if len(letters) == 1 and None not in letters else ()
    if not isinstance(listed, list) or not all(isinstance(choice, str) and choice.strip() for choice in listed):
        raise DataError(
            f"{where}, field extra_info.choices: expected a list of texts, found {describe(listed)}; re-export the row"
        )
    choices = tuple(choice.strip() for choice in listed)
    if not any(letter_of(answer, choices) for answer in answers):
        raise DataError(
            f"{where}, field reward_model.ground_truth: neither the letter nor the text of one of its "
            f"{len(choices)} choices; correct it or remove the row"
        )
    return (question if shown else with_options(question, choices)), choices


def _question(row: dict[str, Any], where: str, images: int) -> str:
    """`extra_info.question`, else the last user message; without image placeholders."""
    info = row.get("extra_info")
    text = info.get("question") if isinstance(info, dict) else None
    if not isinstance(text, str) or not text.strip():
        text = _user_message(row.get("prompt"))
    if text.count(PLACEHOLDER) > images:
        raise DataError(
            f"{where}, field images: the question shows {text.count(PLACEHOLDER)} images, the row has {images}; "
            "add the images or remove the row"
        )
    question = " ".join(part for part in (piece.strip() for piece in text.split(PLACEHOLDER)) if part)
    if not question:
        raise DataError(
            f"{where}, field extra_info.question: empty, and prompt has no user message; fill it or remove the row"
        )
    return question


def _user_message(prompt: Any) -> str:
    messages = prompt if isinstance(prompt, list) else []
    users = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    texts = [message.get("content") for message in users]
    return texts[-1] if texts and isinstance(texts[-1], str) else ""


def _answers(reward_model: Any, where: str) -> tuple[str, ...]:
    """`reward_model.ground_truth`: a list, a JSON list of texts, a text or a number."""
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    listed = truth if isinstance(truth, list) else _json_texts(truth)
    answers = tuple(str(answer).strip() for answer in listed if isinstance(answer, (str, int, float)))
    if not answers or len(answers) != len(listed) or not all(answers):
        raise DataError(
            f"{where}, field reward_model.ground_truth: expected a text or a list of texts, found {describe(truth)}; "
            "fill it or remove the row"
        )
    return answers


def _json_texts(truth: Any) -> list[Any]:
    """A scalar as a list of one. `["a", "b"]` is a list of answers, `[3, 4]` is one answer (a point, an interval)."""
    if isinstance(truth, str) and truth.lstrip().startswith("["):
        try:
            parsed = json.loads(truth)
        except (ValueError, RecursionError):
            return [truth]
        if parsed and isinstance(parsed, list) and all(isinstance(item, str) for item in parsed):
            return parsed
    return [truth]


def _images(entries: Any, where: str, image_root: ImageRoot | None) -> tuple[bytes, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise DataError(
            f"{where}, field images: expected a list of {{bytes, path}}, found {describe(entries)}; re-export"
        )
    images = []
    for number, entry in enumerate(entries):
        field = f"{where}, field images[{number}]"
        data = _image_bytes(entry, field, image_root)
        check_image(data, field)
        images.append(data)
    return tuple(images)


def _image_bytes(entry: Any, field: str, image_root: ImageRoot | None) -> bytes:
    if isinstance(entry, dict) and isinstance(entry.get("bytes"), bytes):
        return entry["bytes"]
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or not path:
        raise DataError(f"{field}: neither bytes nor a path; re-export the row with its image")
    refuse_url(path, field)
    if image_root is None:
        raise DataError(f"{field}: has a path and no bytes; set image_root to the folder that paths start from")
    return image_root.read(path, field)
