"""MATH-Vision: competition problems, about half of them multiple choice.

Two layouts with the same fields (id, question, options, answer). Official, mathllm/MATH-V: `data/test.jsonl`,
`data/testmini.jsonl` and `images/`, where `image` is a path. Hugging Face, MathLLMs/MathVision:
`data/{test,testmini}-*.parquet` with the picture in `decoded_image`, as lmms-eval reads it
(lmms_eval/tasks/mathvision/utils.py). testmini is a part of test. "<image1>" in a question names the picture or a
part of it and stays as published.
"""

from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, jsonl_rows, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.choices import LETTERS, with_options
from maestro_jax.data.roots import ImageRoot, open_root
from maestro_jax.data.rows import Row
from maestro_jax.types import Task

SPLITS = ("test", "testmini")
COLUMNS = ("id", "question", "options", "answer", "decoded_image")


def tasks(directory: Path) -> dict[str, Tasks]:
    found = {}
    for split in SPLITS:
        lines = [path for path in (directory / f"{split}.jsonl", directory / f"data/{split}.jsonl") if path.is_file()]
        if paths := parquet_files(directory, split):
            found[split] = tasks_of(parquet_rows(paths, COLUMNS), partial(_of_parquet, split))
        elif lines:
            convert = partial(_of_jsonl, split, open_root(directory, str(directory)))
            found[split] = tasks_of(jsonl_rows(lines[0]), convert)
    return found


def _of_parquet(split: str, row: Row) -> Task:
    return _task(split, row, row.picture("decoded_image"))


def _of_jsonl(split: str, root: ImageRoot, row: Row) -> Task:
    return _task(split, row, root.read(row.text("image"), f"{row.where}, field image"))


def _task(split: str, row: Row, image: bytes) -> Task:
    choices, answers = row.texts("options"), row.scalars("answer")
    if choices and answers[0] not in LETTERS[: len(choices)]:
        raise row.error("answer", f"expected the letter of one of {len(choices)} options; correct it")
    return Task(
        id=f"MathVision/{split}/{row.scalars('id')[0]}",
        question=with_options(row.text("question"), choices),
        images=(image,),
        answers=answers,
        source="MathVision",
        choices=choices,
        kind="choice" if choices else "free",
    )
