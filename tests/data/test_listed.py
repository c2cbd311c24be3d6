"""Tasks of a function of the user's: opened by its name, checked one by one."""

import io
from pathlib import Path

import pytest

from maestro_jax.data.opening import open_source
from maestro_jax.data.source import Label
from maestro_jax.data.survey import Origin, survey
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.observe.progress import Progress
from maestro_jax.types import Task

MINE = "tests.rewards.mine"


def opened(*paths: str, split: str = "train"):
    return open_source(f"{MINE}:open_tasks", paths, split=split)


def test_the_function_is_told_paths_and_split() -> None:
    source = opened("red", "blue", split="test")
    assert [source[n] for n in range(len(source))] == [
        Task("test/0", "what is red?", (), ("red",), "mine"),
        Task("test/1", "what is blue?", (), ("blue",), "mine"),
    ]
    assert len(opened()) == 2  # it may need no files
    assert list(source.labels()) == [Label("test/0", "mine"), Label("test/1", "mine")]
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("no task", "row 1 is a str; give a maestro_jax.types.Task"),
        ("no id", "row 1, field id: expected a text, found an empty str; fill it or remove the row"),
        ("list", "row 1, field answers: expected a tuple, found a list; correct it or remove the row"),
    ],
)
def test_a_wrong_task_is_a_damaged_row(problem: str, told: str) -> None:
    source = opened("red", problem)
    with pytest.raises(DataError) as caught:
        source[1]
    assert str(caught.value) == f"{MINE}:open_tasks {told}"
    assert list(source.labels()) == [Label("train/0", "mine"), None]


def test_what_opens_no_tasks_is_named_with_its_reason() -> None:
    with pytest.raises(DataError, match=f"{MINE}:opens_nothing cannot open its tasks .TypeError: .*NoneType"):
        open_source(f"{MINE}:opens_nothing", ())
    with pytest.raises(ConfigError, match='config.data.kind "nobody.knows:it" does not import'):
        open_source("nobody.knows:it", ())


def test_what_a_survey_found_is_kept_as_long_as_the_files_do_not_change(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("red")
    kept = tmp_path / "data.json"
    for source, times in (
        (opened(str(file)), 1),
        (opened(str(file)), 1),
        (opened("no file"), 2),
        (opened("no file"), 3),
    ):
        assert survey(source, "tasks", kept, Progress(io.StringIO())) == [Origin("mine", "", 0)]
        assert kept.read_text().count("mine") == times
