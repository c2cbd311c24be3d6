"""MicroVQA: multiple-choice questions on microscopy images, several images to some of them.

Hugging Face, jmhb/microvqa: `data/{train,test}-*.parquet` (key_question, question, images_list, choices,
correct_index from 0), as jmhb0/microvqa eval/eval.py and run_eval.py read it. One split, which was named train at
first and test later ("fixed dataset split name"); it is used for evaluation and comes out as "test" here.
"""

from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.choices import LETTERS, with_options
from maestro_jax.data.rows import Row
from maestro_jax.types import Task

COLUMNS = ("question", "images_list", "choices", "correct_index")


def tasks(directory: Path) -> dict[str, Tasks]:
    paths = parquet_files(directory, "test") or parquet_files(directory, "train")
    return {"test": tasks_of(parquet_rows(paths, COLUMNS), _task)} if paths else {}


def _task(row: Row) -> Task:
    choices, correct = row.texts("choices"), row.integer("correct_index")
    if not 0 <= correct < len(choices):
        raise row.error("correct_index", f"{correct} is none of {len(choices)} choices; correct it or remove the row")
    return Task(
        id=f"MicroVQA/test/{row.number:06d}",
        question=with_options(row.text("question"), choices),
        images=row.pictures("images_list"),
        answers=(LETTERS[correct],),
        source="MicroVQA",
        choices=choices,
    )
