"""Metrics survive kills and resumes: at most one line is lost, none is repeated."""

import json
import math
import os
import pathlib

import numpy as np
import pytest

from maestro_jax.errors import DataError
from maestro_jax.observe.metrics import MetricsWriter, read_metrics


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_come_back(path: pathlib.Path) -> None:
    rows: list[dict] = [{"step": 1, "reward": 0.5, "by": {"charts": 1}, "note": "é"}, {"step": 2, "reward": None}]
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)
    assert read_metrics(path) == rows


def test_each_line_is_on_disk_at_once(path: pathlib.Path) -> None:
    writer = MetricsWriter(path)
    writer.write({"step": 1})
    assert read_metrics(path) == [{"step": 1}]
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_floats_that_are_not_finite_become_null(path: pathlib.Path, value: float) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": value, "parts": [value]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None, "parts": [None]}


def test_array_scalars_become_numbers(path: pathlib.Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "a": np.float32(0.5), "b": np.int64(3), "c": np.array([2.0])})
    assert read_metrics(path) == [{"step": 1, "a": 0.5, "b": 3, "c": 2.0}]


@pytest.mark.parametrize("row", [{}, {"step": None}, {"step": "1"}])
def test_row_without_step_is_refused(path: pathlib.Path, row: dict) -> None:
    with MetricsWriter(path) as writer, pytest.raises(TypeError, match="step"):
        writer.write(row)


def test_value_that_is_no_metric_is_refused(path: pathlib.Path) -> None:
    with MetricsWriter(path) as writer, pytest.raises(TypeError, match="cannot write a bytes"):
        writer.write({"step": 1, "image": b"x"})


def test_reopening_appends(path: pathlib.Path) -> None:
    for step in (1, 2):
        with MetricsWriter(path) as writer:
            writer.write({"step": step})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_truncation_keeps_steps_up_to_the_checkpoint(path: pathlib.Path) -> None:
    with MetricsWriter(path) as writer:
        for step in (1, 2, 2, 3, 4):
            writer.write({"step": step})
        writer.truncate_after(2)
        writer.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "again": True}]
    assert [item.name for item in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncation_killed_before_the_move_leaves_the_old_file(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricsWriter(path)
    writer.write({"step": 1})
    writer.write({"step": 2})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.truncate_after(1)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("kept", range(1, 14))
def test_half_written_line_is_dropped(path: pathlib.Path, kept: int) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        writer.write({"step": 22})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + min(kept, len(whole) - first - 1)])
    assert read_metrics(path) == [{"step": 1}]
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ["{", "[]", '{"reward": 1}', ""])
def test_damaged_line_is_named(path: pathlib.Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match="line 2: not a JSON object with a step"):
        read_metrics(path)


def test_missing_file_is_named(path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="cannot read .*metrics.jsonl"):
        read_metrics(path)
