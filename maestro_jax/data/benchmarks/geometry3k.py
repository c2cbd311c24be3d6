"""Geometry3K: geometry problems with a diagram.

Two layouts. Official, lupantech/InterGPS (`data/geometry3k/{train,val,test}.zip`, unpacked): a folder a problem with
`data.json` (problem_text, choices, answer as a letter, id; seen in annotation_tool/data_collection/data_examples) and
`img_diagram.png`: multiple choice. Hugging Face, hiyouga/geometry3k: `data/{train,validation,test}-*.parquet`
(images, problem that begins with "<image>", answer as text), as verl's examples/data_preprocess/geo3k.py reads it:
free answers.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Rows, Tasks, object_row, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.choices import LETTERS, with_options
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.errors import DataError
from maestro_jax.types import Task

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def tasks(directory: Path) -> dict[str, Tasks]:
    found = {}
    for split, name in SPLITS.items():
        if paths := parquet_files(directory, split):
            rows = parquet_rows(paths, ("images", "problem", "answer"))
            found[split] = tasks_of(rows, partial(_of_parquet, split))
        elif folders := sorted((directory / name).glob("*/data.json"), key=_number):
            root = open_root(directory / name, str(directory / name))
            found[split] = tasks_of(_problems(folders), partial(_of_folder, split, root))
    return found


def _number(path: Path) -> tuple[int, str]:
    name = path.parent.name
    return (int(name) if name.isdecimal() else 0, name)


def _problems(paths: list[Path]) -> Rows:
    def read() -> Iterator[Row | DataError]:
        for number, path in enumerate(paths):
            try:
                fields = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                yield DataError(f"cannot read {path}: not a complete JSON file; unpack it again or remove its folder")
                continue
            row = object_row(fields, str(path), number)
            # Problems are named by their folder, in the data as in the file itself ("id").
            yield (
                row
                if isinstance(row, DataError)
                else Row({**row.fields, "folder": path.parent.name}, str(path), number)
            )

    return Rows(len(paths), read)


def _of_folder(split: str, root: ImageRoot, row: Row) -> Task:
    choices, answer = row.texts("choices"), row.text("answer")
    if answer not in LETTERS[: len(choices)]:
        raise row.error("answer", f"expected the letter of one of {len(choices)} choices; correct it")
    folder = row.text("folder")
    return Task(
        id=f"Geometry3K/{split}/{folder}",
        question=with_options(row.text("problem_text"), choices),
        images=(root.read(f"{folder}/img_diagram.png", row.where),),
        answers=(answer,),
        source="Geometry3K",
        choices=choices,
        kind="choice",
    )


def _of_parquet(split: str, row: Row) -> Task:
    question = row.text("problem").replace("<image>", "").strip()
    name = f"Geometry3K/{split}/{row.number:06d}"
    return Task(name, question, row.pictures("images"), row.scalars("answer"), "Geometry3K", kind="free")
