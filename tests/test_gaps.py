"""A figure with gaps is said with its gaps; it is not kept, not drawn and not published as a result."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maestro_jax.evaluation.policy import Evaluation
from maestro_jax.observe.accuracy import plot_accuracy
from maestro_jax.observe.figures import plot_curves
from maestro_jax.observe.table import whole_figures
from maestro_jax.registry.journal import Journal
from maestro_jax.train import kept_if_whole
from maestro_jax.training import held_out


def evaluation(missing: int) -> Evaluation:
    return Evaluation(0.75, {"charts": 0.75}, 0.7, 1.0, 1.0, {"charts": {("A", "X"): 3}}, missing)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_result_with_gaps_is_computed_again_at_every_start(tmp_path: Path, missing: int) -> None:
    journal, made = Journal(str(tmp_path / "journal.jsonl")), []

    def compute() -> Evaluation:
        made.append(evaluation(missing))
        return made[-1]

    for _ in range(2):
        assert kept_if_whole(tmp_path / "before.json", journal, Evaluation, compute) == evaluation(missing)
    journal.close()
    assert len(made) == 1 + missing and (tmp_path / "before.json").exists() == (not missing)


def drawn(path: Path, draw: Callable[[Path], None]) -> np.ndarray:
    draw(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def test_a_curve_has_no_point_of_an_evaluation_with_gaps(tmp_path: Path) -> None:
    rows = [{"step": step, "reward": 0.5, "accuracy": 0.5} for step in range(4)]
    without, gap, whole = (
        drawn(tmp_path / f"{number}.png", lambda path, row=row: plot_curves([*rows, *row], {}, path))
        for number, row in enumerate(
            ([], [{"step": 3, **held_out(evaluation(1))}], [{"step": 3, **held_out(evaluation(0))}])
        )
    )
    assert (gap == without).all() and (whole != without).any()


def test_figures_that_gaps_reach_are_left_out() -> None:
    accuracy = {"random": 0.1, "domain_oracle": 0.9, "warm_start": 0.4, "trained": 0.8}
    assert whole_figures({"accuracy": accuracy}) == accuracy
    missing = {"warm_start": 0, "trained": 2, "baselines": 0}
    assert whole_figures({"accuracy": accuracy, "missing": missing}).keys() == accuracy.keys() - {"trained"}
    missing = {"warm_start": 0, "trained": 0, "baselines": 7}
    assert whole_figures({"accuracy": accuracy, "missing": missing}).keys() == {"warm_start", "trained"}


def test_a_benchmark_with_gaps_has_no_bar(tmp_path: Path) -> None:
    def row(mean: float, missing: int) -> dict:
        return {"tasks": 10, "missing": missing, "accuracy": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}

    def picture(name: str, mean: float, missing: int) -> np.ndarray:
        benchmarks = {"charts": row(0.5, 0), "reading": row(mean, missing)}
        average = {"accuracy": row((0.5 + mean) / 2, 0)["accuracy"]}
        summary = json.loads(json.dumps({"benchmarks": benchmarks, "average": average}))
        return drawn(tmp_path / name, lambda path: plot_accuracy(summary, path))

    assert (picture("a.png", 0.8, 0) != picture("b.png", 0.3, 0)).any()
    assert (picture("c.png", 0.8, 2) == picture("d.png", 0.3, 2)).all()  # neither its own nor the average's
