"""The benchmark of the data pipeline: what it reads of a run, and what it says."""

import json
from pathlib import Path

import pytest

from benchmarks.data import QUICKSTART, Load, picture, results_of, step_seconds
from maestro_jax.errors import ConfigError
from maestro_jax.images import decode_image


def test_a_step_is_the_median_without_the_one_that_compiles(tmp_path: Path) -> None:
    rows = [{"step": 0}, {"step": 1, "seconds": 30.0}, *({"step": n, "seconds": float(n)} for n in (2, 3, 4))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert step_seconds(tmp_path) == 3.0


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run maestro_jax.train with configs/quickstart.py"):
        step_seconds(tmp_path)


def test_ratios_are_to_the_step_and_to_preparing_within_it() -> None:
    measured = {"ahead": [0.1, 0.2, 0.4], "collate": [0.01], "whole": [0.05], "encoded": 1024, "prepared": 2048}
    results = results_of(QUICKSTART, measured | {"peak": 3 << 20, "later": 3 << 20, "bound": 4 << 20}, step=2.0)
    assert results["quickstart ahead"].ratio == 10.0  # type: ignore[union-attr]
    assert results["quickstart step"].ratio == pytest.approx(5.0)  # type: ignore[union-attr]
    assert (results["quickstart memory"].value, results["quickstart memory"].reach) == (3.0, 4.0)  # type: ignore[union-attr]


def test_pictures_are_of_their_size_and_repeatable() -> None:
    load = Load("80x120", 80, 120, "JPEG")
    assert decode_image(picture(load, 1), "x").shape == (120, 80, 3)
    assert picture(load, 1) == picture(load, 1) != picture(load, 2)
