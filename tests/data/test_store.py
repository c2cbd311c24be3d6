"""Tasks are written a few at a time, whatever order their splits come in."""

import pathlib

import pytest

from maestro_jax.data.source import TfdsSource
from maestro_jax.data.store import beside, write_stream
from maestro_jax.errors import ConfigError
from maestro_jax.types import Task


@pytest.mark.parametrize("limit", ["_AT_A_TIME", "_BYTES_AT_A_TIME"])
def test_splits_may_come_in_any_order(
    tmp_path: pathlib.Path, tasks: list[Task], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"maestro_jax.data.store.{limit}", 3)
    splits = ["train" if number % 3 else "test" for number in range(len(tasks))]
    write_stream(tmp_path, "toy", "", ["train", "test"], zip(splits, tasks, strict=True))
    for split in ("train", "test"):
        source = TfdsSource(tmp_path, split)
        expected = [task for name, task in zip(splits, tasks, strict=True) if name == split]
        assert [source[index] for index in range(len(source))] == expected


def test_what_is_not_moved_is_removed(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "new" / "data"
    with beside(target) as building:
        (building / "file").write_text("half")
    assert not list(target.parent.iterdir())
    with beside(target) as building:
        (building / "file").write_text("whole")
        building.rename(target)
    assert [path.name for path in target.parent.iterdir()] == ["data"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write .*name another directory"), beside(tmp_path / "file" / "data"):
        pass
