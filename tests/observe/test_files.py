"""Files of a run are written whole or not at all, and say which of them fails."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from maestro_jax.errors import DataError, UserError
from maestro_jax.observe.files import read_json, write_json
from maestro_jax.observe.metrics import MetricsWriter


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The kernel refuses to make any file longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5, "é"]})
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, "é"]}
    assert read_json(tmp_path / "none.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    write_json(path, 1)
    with (
        full_disk(),
        pytest.raises(
            UserError, match=r"before.json cannot be written \(File too large\); free its disk, or raise its quota"
        ),
    ):
        write_json(path, 2)
    assert read_json(path) == 1


def test_a_full_disk_is_told_by_metrics(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with (
        full_disk(),
        pytest.raises(
            UserError, match=r"metrics.jsonl cannot be written \(File too large\); free its disk, or raise its quota"
        ),
    ):
        writer.write({"step": 1})


@pytest.mark.parametrize("text", ["", '{"accuracy": 0.', "\udcff"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"before.json is damaged, it is no JSON .*; remove it"):
        read_json(path)
