"""MSEarthMCQ: multiple-choice questions on figures of papers in Earth science.

Hugging Face, MSEarth/MSEarth_MCQ: `data/*.parquet` (query, response, image, question_id), written by xiangyu-mm/MSEarth
auto_evaluator/results/upload.py. `query` is "<image>Caption: ... Question: ... Options: A. ... B. ..." and `response`
"B. text" (generate_msearth/format_MCQ.py; VLMEvalKit's MSEarthMCQ reads both so). One split, named train or test, which
comes out as "test".
"""

from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.choices import letter_of, split_options, with_options
from maestro_jax.data.rows import Row
from maestro_jax.types import Task


def tasks(directory: Path) -> dict[str, Tasks]:
    paths = parquet_files(directory, "test") or parquet_files(directory, "train")
    return {"test": tasks_of(parquet_rows(paths, ("query", "response", "image")), _task)} if paths else {}


def _task(row: Row) -> Task:
    # Captions have parts (A) and (B) themselves: options are what stands behind their heading.
    question, _, options = row.text("query").replace("<image>", "").rpartition("Options:")
    _, choices = split_options(options)
    if not choices:
        raise row.error("query", "shows no options (A. ..., B. ...); correct it or remove the row")
    answer = row.text("response")
    letter = letter_of(answer, choices) or letter_of(answer[:1], choices)
    if letter is None:
        raise row.error("response", f"expected one of {len(choices)} options; correct it or remove the row")
    return Task(
        id=f"MSEarthMCQ/test/{row.number:06d}",
        question=with_options(f"{question.strip()}\nOptions:", choices),
        images=(row.picture("image"),),
        answers=(letter,),
        source="MSEarthMCQ",
        choices=choices,
    )
