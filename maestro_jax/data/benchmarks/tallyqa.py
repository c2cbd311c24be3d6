"""TallyQA: counting questions, simple or complex, on images of COCO and Visual Genome.

Official, manoja328/TallyQA_dataset (README.md): `train.json` and `test.json` from tallyqa.zip (question, answer, image,
issimple, question_id). `image` is a path such as "VG_100K_2/2410408.jpg" or "train2014/COCO_train2014_....jpg"; the
image folders of Visual Genome and COCO lie beside the two files.
"""

from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, json_rows, tasks_of
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.types import Task

SPLITS = ("train", "test")


def tasks(directory: Path) -> dict[str, Tasks]:
    root = open_root(directory, str(directory))
    return {
        split: tasks_of(json_rows(path), partial(_task, split, root))
        for split in SPLITS
        if (path := directory / f"{split}.json").is_file()
    }


def _task(split: str, root: ImageRoot, row: Row) -> Task:
    # An entry without the flag has no kind; graders of counts do not need it.
    kind = {True: "simple", False: "complex"}[row.values("issimple", bool)] if row.has("issimple") else ""
    return Task(
        id=f"TallyQA/{split}/{row.integer('question_id')}",
        question=row.text("question"),
        images=(root.read(row.text("image"), f"{row.where}, field image"),),
        answers=(str(row.integer("answer")),),
        source="TallyQA",
        kind=kind,
    )
