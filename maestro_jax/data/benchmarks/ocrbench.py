"""OCRBench: 1,000 questions of ten kinds about text in images.

Two layouts. Official, Yuliang-Liu/MultimodalOCR: `OCRBench/OCRBench/OCRBench.json` (image_path, question, answers as
a text or a list, type) and the folder `OCRBench_Images/`. Hugging Face, echo840/OCRBench: `data/test-*.parquet`
(image, question, answer as a list, question_type), written by lmms-eval's
lmms_eval/tasks/ocrbench/upload_ocrbench.py.
"""

from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, json_rows, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.errors import DataError
from maestro_jax.types import Task

JSON = ("OCRBench.json", "OCRBench/OCRBench.json", "OCRBench/OCRBench/OCRBench.json")


def tasks(directory: Path) -> dict[str, Tasks]:
    if paths := parquet_files(directory, "test"):
        rows = parquet_rows(paths, ("image", "question", "answer", "question_type"))
        return {"test": tasks_of(rows, _of_parquet)}
    lists = [path for name in JSON if (path := directory / name).is_file()]
    if not lists:
        return {}
    images = directory / "OCRBench_Images"
    if not images.is_dir():
        raise DataError(f"{directory}: no folder OCRBench_Images; unpack the benchmark's images there")
    return {"test": tasks_of(json_rows(lists[0]), partial(_of_json, open_root(images, str(images))))}


def _of_parquet(row: Row) -> Task:
    return _task(row, row.picture("image"), "answer", "question_type")


def _of_json(root: ImageRoot, row: Row) -> Task:
    image = root.read(row.text("image_path"), f"{row.where}, field image_path")
    return _task(row, image, "answers", "type")


def _task(row: Row, image: bytes, answers: str, kind: str) -> Task:
    name = f"OCRBench/test/{row.number:06d}"
    return Task(name, row.text("question"), (image,), row.scalars(answers), "OCRBench", kind=row.text(kind))
