"""Every kind of source by its name in the config."""

import json
import pathlib

import pytest

from maestro_jax.data.opening import KINDS, open_source
from maestro_jax.data.store import write_tasks
from maestro_jax.types import Task
from tests.data.verl_rows import row, write_rows


@pytest.fixture
def folder(tmp_path: pathlib.Path, tasks: list[Task], png: bytes) -> pathlib.Path:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tasks(tmp_path / name, "toy", "", {"train": tasks[:3], "test": tasks[3:5]})
        write_rows(tmp_path / f"{name}.parquet", [row(number, png, images=[{"path": "0.png"}]) for number in range(2)])
        line = {"question": "What?", "images": ["0.png"], "answers": "1", "source": "toy"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    (tmp_path / "0.png").write_bytes(png)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "ending", "count"), [("tfds", "", 3), ("verl", ".parquet", 2), ("jsonl", ".jsonl", 1)]
)
def test_several_of_a_kind_follow_each_other(
    folder: pathlib.Path, kind: str, ending: str, count: int, png: bytes
) -> None:
    assert kind in KINDS
    paths = [str(folder / f"{name}{ending}") for name in "ab"]
    source = open_source(kind, paths, image_root=str(folder))
    assert len(source) == 2 * count and len(open_source(kind, paths[:1], image_root=str(folder))) == count
    found = [source[index] for index in range(2 * count)]
    assert all(task.images == (png,) for task in found)
    assert [task.question for task in found[:count]] == [task.question for task in found[count:]]
    with pytest.raises(IndexError):
        source[2 * count]


def test_the_split_is_that_of_the_data_sets(folder: pathlib.Path, tasks: list[Task]) -> None:
    source = open_source("tfds", [str(folder / "a"), str(folder / "b")], split="test")
    assert [source[index] for index in range(4)] == [*tasks[3:5], *tasks[3:5]]
    assert len(open_source("tfds", [str(folder / "a")], split="train[:2]")) == 2
