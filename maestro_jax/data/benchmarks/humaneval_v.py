"""HumanEval-V: Python functions to be written from a diagram, judged by their tests.

Hugging Face, HumanEval-V/HumanEval-V-Benchmark: `data/test-*.parquet` (qid, function_signature, diagram, test_script,
task_type; humaneval_v_test_hf/dataset_info.json in the GitHub repository of that name). The gold answer is the program
with the tests; the official evaluation runs it behind the signature and the answer (evaluate.py: post_process).
"""

from pathlib import Path

from maestro_jax.data.benchmarks.files import Tasks, parquet_files, parquet_rows, tasks_of
from maestro_jax.data.rows import Row
from maestro_jax.types import Task

COLUMNS = ("qid", "function_signature", "diagram", "test_script")


def tasks(directory: Path) -> dict[str, Tasks]:
    paths = parquet_files(directory, "test")
    return {"test": tasks_of(parquet_rows(paths, COLUMNS), _task)} if paths else {}


def _task(row: Row) -> Task:
    signature = row.text("function_signature")
    return Task(
        id=f"HumanEval-V/test/{row.text('qid')}",
        question=f"Complete the Python function so that it does what the diagram shows.\n```python\n{signature}\n```",
        images=(row.picture("diagram"),),
        answers=(row.text("test_script"),),
        source="HumanEval-V",
        kind="code",
    )
