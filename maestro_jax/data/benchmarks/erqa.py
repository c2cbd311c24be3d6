"""ERQA: embodied reasoning, multiple choice, often with several images.

Two layouts with the same content. Official, embodiedreasoning/ERQA: `data/erqa.tfrecord` of tf.train.Example
(question, answer, image/encoded, question_type, visual_indices), as loading scripts derived from the repository's
loading_example.py parse it. Hugging Face, FlagEval/ERQA: `data/test-*.parquet` (question, answer, images,
question_type, visual_indices), as lmms-eval reads it (lmms_eval/tasks/erqa/utils.py). `visual_indices` are the places
of the images in the text: 0 is in front of it. The question holds its options ("Choices: A. ... B. ...") and stays as
published; a question whose options cannot be told from its text gets the letters A to D, which all answers are.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maestro_jax.data.benchmarks import tfrecord
from maestro_jax.data.benchmarks.files import Rows, Tasks, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.choices import LETTERS, split_options
from maestro_jax.data.rows import Row
from maestro_jax.errors import DataError
from maestro_jax.types import Task

COLUMNS = ("question", "answer", "images", "question_type", "visual_indices")
_INSTRUCTION = re.compile(r"(?<!\s)\s*Please answer (?:directly )?with only the letter.*$", re.DOTALL)


def tasks(directory: Path) -> dict[str, Tasks]:
    records = [path for path in (directory / "erqa.tfrecord", directory / "data/erqa.tfrecord") if path.is_file()]
    if paths := parquet_files(directory, "test"):
        return {"test": tasks_of(parquet_rows(paths, COLUMNS), _of_parquet)}
    return {"test": tasks_of(_records(records[0]), _of_record)} if records else {}


def _records(path: Path) -> Rows:
    def read() -> Iterator[Row | DataError]:
        for number, data in enumerate(tfrecord.read_records(path)):
            where = f"{path} record {number}"
            try:
                features = tfrecord.parse_example(data)
                fields: dict[str, Any] = {
                    name: b"".join(v for v in features.get(name, ()) if isinstance(v, bytes)).decode()
                    for name in ("question", "answer", "question_type")
                }
            except ValueError as error:  # also a text that is not UTF-8
                yield DataError(f"{where}: not a tf.train.Example ({error}); download the file again")
                continue
            fields["images"] = [value for value in features.get("image/encoded", ()) if isinstance(value, bytes)]
            fields["visual_indices"] = features.get("visual_indices")
            yield Row(fields, where, number)

    return Rows(tfrecord.count_records(path), read)


def _of_record(row: Row) -> Task:
    return _task(row, tuple(row.values("images", list)))


def _of_parquet(row: Row) -> Task:
    return _task(row, row.pictures("images"))


def _task(row: Row, images: tuple[bytes, ...]) -> Task:
    text = row.text("question")
    _, _, options = _INSTRUCTION.sub("", text).rpartition("Choices:")
    choices = split_options(options)[1] or tuple(LETTERS[:4])
    answer = row.text("answer").strip(" .()").upper()
    if len(answer) != 1 or answer not in LETTERS[: len(choices)]:
        raise row.error("answer", f"expected the letter of one of {len(choices)} choices; correct it")
    indices = row.values("visual_indices", list) if row.has("visual_indices") else []
    question, order = _with_marks(text, indices, len(images))
    return Task(
        id=f"ERQA/test/{row.number:06d}",
        question=question,
        images=tuple(images[position] for position in order),
        answers=(answer,),
        source="ERQA",
        choices=choices,
        kind=row.text("question_type") if row.has("question_type") else "",
    )


def _with_marks(text: str, indices: Sequence[Any], images: int) -> tuple[str, list[int]]:
    """The text with "[image 2]" where an image stands within it, and the images in that order.

    Images come before the text in our prompt; without marks nobody could tell which one is meant.
    """
    if len(indices) != images or not all(isinstance(index, int) for index in indices) or not any(indices):
        return text, list(range(images))
    order = sorted(range(images), key=lambda position: indices[position])
    marked = text
    for number in reversed(range(images)):  # from the end, so that places before stay right
        if place := indices[order[number]]:
            marked = f"{marked[:place].rstrip()} [image {number + 1}] {marked[place:].lstrip()}"
    return marked.strip(), order
