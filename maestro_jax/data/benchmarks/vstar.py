"""V*Bench: multiple-choice questions on small things in large images.

Hugging Face, craigwu/vstar_bench: `test_questions.jsonl` (image, text, category, label, question_id) and the image
folders `direct_attributes/` and `relative_position/`. `text` is the question with lines "(A) rubber" and an
instruction, `label` the letter; the fields are those that public readers name (inspect_evals' vstar_bench,
lmms-eval's vstar_bench/utils.py).
"""

from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, jsonl_rows, tasks_of
from maestro_jax.data.choices import letter_of, split_options, with_options
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.types import Task


def tasks(directory: Path) -> dict[str, Tasks]:
    path = directory / "test_questions.jsonl"
    if not path.is_file():
        return {}
    return {"test": tasks_of(jsonl_rows(path), partial(_task, open_root(directory, str(directory))))}


def _task(root: ImageRoot, row: Row) -> Task:
    question, choices = split_options(row.text("text"))
    if not choices:
        raise row.error("text", "shows no options ((A) ..., (B) ...); correct it or remove the line")
    letter = letter_of(row.text("label"), choices)
    if letter is None:
        raise row.error("label", f"expected the letter of one of {len(choices)} options; correct it or remove the line")
    return Task(
        id=f"VStar/test/{row.number:06d}",
        question=with_options(question, choices),
        images=(root.read(row.text("image"), f"{row.where}, field image"),),
        answers=(letter,),
        source="VStar",
        choices=choices,
        kind=row.text("category"),
    )
