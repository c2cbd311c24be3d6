"""A figure with gaps is not kept, drawn or published, and what followed it stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maestro_jax.checkpoint.run import has_begun
from maestro_jax.evaluation.log import RecordLog
from maestro_jax.evaluation.policy import Evaluation
from maestro_jax.jobs.train import kept_if_whole
from maestro_jax.observe.accuracy import plot_accuracy
from maestro_jax.observe.figures import plot_curves
from maestro_jax.observe.table import whole_figures
from maestro_jax.registry.record.journal import Journal
from maestro_jax.registry.record.replay import read_calls
from maestro_jax.session.binding import holds_calls
from maestro_jax.training.loop import held_out
from maestro_jax.types import Call, Observation, Status


def evaluation(missing: int) -> Evaluation:
    return Evaluation(0.75, {"charts": 0.75}, 0.7, 1.0, 1.0, {"charts": {("A", "X"): 3}}, missing)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_result_with_gaps_is_computed_again_at_every_start(tmp_path: Path, missing: int) -> None:
    journal, made = Journal(str(tmp_path / "journal.jsonl")), []

    def compute() -> Evaluation:
        made.append(evaluation(missing))
        return made[-1]

    for _ in range(2):
        assert kept_if_whole(tmp_path / "before.json", journal, Evaluation, compute, alone=False) == evaluation(missing)
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


def test_a_section_that_is_made_again_alone_leaves_what_followed(tmp_path: Path) -> None:
    call, journal = Call("A", "X", "q"), Journal(str(tmp_path / "journal.jsonl"))
    for section, alone, text in (("before", False, "old"), ("step 1", False, "kept"), ("before", True, "new")):
        journal.begin(section, alone)
        journal.call("asker", call, "question", (), Observation(text, Status.OK))
    journal.begin("step 2")
    journal.close()
    assert [(key.section, seen.text) for key, seen in read_calls(journal.path)] == [
        ("before", "new"),
        ("step 1", "kept"),
    ]


def test_batches_that_wait_behind_one_that_is_made_again_are_known(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "log.jsonl")
    log.add("0", [{"marked": True}])
    log.add("1", [{"marked": False}])
    log.close()
    log = RecordLog(tmp_path / "log.jsonl", lambda records: not records[0]["marked"])
    assert log.get("0") is None and log.is_ahead
    log.add("0", [{"marked": False}])
    assert log.get("1") and not log.is_ahead
    log.close()


@pytest.mark.parametrize("name", ["baselines.json", "before.json", "metrics.jsonl", "warm_start/20", "checkpoints/10"])
def test_a_run_has_begun_with_whatever_later_starts_take_over(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints" / "10.partial").mkdir(parents=True)
    (tmp_path / "journal.jsonl").touch()
    assert not has_begun(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert has_begun(tmp_path)


@pytest.mark.parametrize("status", [Status.OK, Status.CONFIG_ERROR])
def test_only_answers_bind_a_start_to_its_registry(tmp_path: Path, status: Status) -> None:
    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.call("asker", Call("A", "X", "q"), "question", (), Observation("", status))
    journal.close()
    assert holds_calls(tmp_path) == (status is Status.OK)
