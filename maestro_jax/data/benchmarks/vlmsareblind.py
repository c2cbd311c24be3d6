"""VLMs Are Blind (BlindTest): simple questions about lines, circles, grids and paths.

Hugging Face, XAI/vlmsareblind: `data/valid-*.parquet` (task, image, prompt, groundtruth), as lmms-eval reads it
(lmms_eval/tasks/vlmsareblind/utils.py). Its one split "valid" is what is evaluated on and comes out as "test".
"""

from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.rows import Row
from maestro_jax.types import Task


def tasks(directory: Path) -> dict[str, Tasks]:
    paths = parquet_files(directory, "valid")
    return {"test": tasks_of(parquet_rows(paths, ("task", "image", "prompt", "groundtruth")), _task)} if paths else {}


def _task(row: Row) -> Task:
    name = f"VLMsAreBlind/test/{row.number:06d}"
    images, answers = (row.picture("image"),), row.scalars("groundtruth")
    return Task(name, row.text("prompt"), images, answers, "VLMsAreBlind", kind=row.text("task"))
