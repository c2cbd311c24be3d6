"""Every prepared task can be graded, and its own gold answer is right."""

import io
import pathlib

import pytest

from maestro_jax.data.prepare import prepare
from maestro_jax.data.source import TfdsSource
from maestro_jax.observe.progress import Progress
from maestro_jax.rewards.graders import BUILT_IN
from tests.data.benchmarks import layouts

PROGRAM = "```python\ndef solution(x: int) -> int:\n    return x + 1\n```"


# A sandbox takes some 15 s to get ready.
SLOW = {"humaneval_v"}
LAYOUTS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in layouts.LAYOUTS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gold_answers_are_right(tmp_path: pathlib.Path, layout: str) -> None:
    name, write = layouts.LAYOUTS[layout]
    counts = write(tmp_path / "files")
    path = prepare(name, tmp_path / "files", tmp_path / "data", Progress(io.StringIO()))
    for split, count in counts.items():
        source = TfdsSource(path, split)
        for task in (source[index] for index in range(count)):
            for gold in task.answers:
                assert BUILT_IN.grade(task, PROGRAM if task.kind == "code" else gold), task.id
            assert not BUILT_IN.grade(task, "nothing of that kind"), task.id
