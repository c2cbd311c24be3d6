"""HR-Bench: multiple-choice questions on images of 4K and 8K, each with its options in four orders.

Hugging Face, DreamMr/HR-Bench: `hr_bench_4k.parquet` and `hr_bench_8k.parquet`, or the same as `.tsv` (index, question,
A to D, answer, category single or cross, cycle_category, image as base64), read so by lmms-eval
(lmms_eval/tasks/hrbench/utils.py) and VLMEvalKit (HRBenchDataset).
"""

import base64
import binascii
from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, parquet_rows, tasks_of, tsv_rows
from maestro_jax.data.choices import with_options
from maestro_jax.data.rows import Row
from maestro_jax.types import Task

OPTIONS = "ABCD"
COLUMNS = ("index", "question", "answer", "category", "image", *OPTIONS)


def tasks(directory: Path, resolution: str) -> dict[str, Tasks]:
    """`resolution` is "4k" or "8k"."""
    convert = partial(_task, f"HRBench-{resolution.upper()}")
    parquet, tsv = (directory / f"hr_bench_{resolution}.{kind}" for kind in ("parquet", "tsv"))
    if parquet.is_file():
        return {"test": tasks_of(parquet_rows([parquet], COLUMNS), convert)}
    return {"test": tasks_of(tsv_rows(tsv), convert)} if tsv.is_file() else {}


def _task(source: str, row: Row) -> Task:
    choices, answer = tuple(row.scalars(letter)[0] for letter in OPTIONS), row.text("answer")
    if len(answer) != 1 or answer not in OPTIONS:
        raise row.error("answer", f"expected one of {', '.join(OPTIONS)}; correct it or remove the row")
    return Task(
        id=f"{source}/test/{row.number:06d}",
        question=with_options(row.text("question"), choices),
        images=(_image(row),),
        answers=(answer,),
        source=source,
        choices=choices,
        kind=row.text("category"),
    )


def _image(row: Row) -> bytes:
    try:
        return base64.b64decode(row.text("image"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error("image", "is not base64; download the file again or remove the row") from error
