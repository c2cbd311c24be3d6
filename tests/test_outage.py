"""Runs whose experts go away: what they say and do meanwhile, and that their figures are those of a run without outage.

The server is real and on this machine; runs are commands of their own, at the size of `test_reliability.py`.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from maestro_jax.checkpoint.committed import Committed
from maestro_jax.errors import EXIT_PREEMPTED
from maestro_jax.observe.metrics import read_metrics
from tests import outage
from tests.test_reliability import SECONDS, Life, Machine, last_update, without_times

STEPS = 5
RESULTS = ("baselines.json", "before.json", "before_sampled.json", "trained.jsonl")
FIGURES = ("summary.json", "curves.png", "routing.png")


class Run:
    """The job against a server; ended and begun again as a test likes."""

    def __init__(self, machine: Machine, server: outage.Server, directory: Path):
        self.machine, self.server, self.workdir = machine, server, directory / "run"
        self.config = directory / "outage.py"
        self.config.write_text(outage.CONFIG.format(url=server.url))

    def train(self, patience: float, *more: str) -> Life:
        return self.machine.run("maestro_jax.train", [*self.flags(patience), f"--workdir={self.workdir}", *more])

    def flags(self, patience: float) -> list[str]:
        """Of every command; no episode may be left out, so that runs can be compared to the last bit."""
        limits = ["--config.rollout.max_marked=0.0", f"--config.rollout.patience={patience}"]
        limits += [f"--config.grpo.steps={STEPS}", "--config.checkpoint.keep=0"]
        return [*self.machine.flags(str(self.config)), *limits]

    @property
    def log(self) -> str:
        path = self.machine.directory / f"{self.machine.lives}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def once(self, text: str, act: Callable[[], None], lives: int = 1) -> None:
        """Acts when the log of the life that is to come holds the text."""
        life = self.machine.lives + lives

        def watch() -> None:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not (
                self.machine.lives == life and re.search(text, self.log, re.MULTILINE)
            ):
                time.sleep(0.01)
            act()

        threading.Thread(target=watch, daemon=True).start()

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    found = Machine(tmp_path_factory.mktemp("machine"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def server() -> Iterator[outage.Server]:
    found = outage.Server()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def undisturbed(machine: Machine, server: outage.Server, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(machine, server, tmp_path_factory.mktemp("undisturbed"))
    life = run.train(60.0)
    assert life.code == 0, life.text
    return run


def assert_same_figures(found: Run, wanted: Run) -> None:
    """Parameters, optimiser, trajectories, metrics and results; not times, nor how much met an outage."""
    for name in RESULTS:
        assert (found.workdir / name).read_text() == (wanted.workdir / name).read_text(), name
    one, two = (Committed(epath.Path(run.workdir / "checkpoints"), STEPS) for run in (found, wanted))
    assert [n for n in two.leaves if one.read_array(n).tobytes() != two.read_array(n).tobytes()] == []
    rows = [without_times(run.workdir / "metrics.jsonl") for run in (found, wanted)]
    one, two = ([{k: v for k, v in row.items() if not k.startswith("marked/")} for row in kind] for kind in rows)
    assert one == two and [row["step"] for row in one] == list(range(STEPS + 1))
    one, two = (json.loads((run.workdir / "summary.json").read_text()) for run in (found, wanted))
    assert one | {"wall_seconds": 0, "marked": {}} == two | {"wall_seconds": 0}


def assert_gave_up(life: Life, saved: str) -> None:
    """It stopped as if it had been told to, with one line that names experts, their share and what is saved."""
    assert life.code == EXIT_PREEMPTED, life.text
    line = life.text.strip().splitlines()[-1]
    assert re.search(
        r"^stopped: waited 1 s \(config.rollout.patience\) for \S+ \(\d+ %\).* met an outage \(.*:\d+", line
    )
    assert line.endswith(f"){saved}; the same command goes on"), line


def test_a_run_through_outages_ends_with_the_figures_of_a_run_without(
    machine: Machine, server: outage.Server, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(machine, server, tmp_path)

    # In the demonstrations, for longer than its patience: nothing is kept of them.
    run.once("registry prompt", server.stop)
    assert_gave_up(run.train(1.0), saved="")
    assert not list((run.workdir / "warm_start").glob("*/")) and not (run.workdir / "baselines.json").exists()

    # In training, for longer than its patience: the last update is saved, and there are no figures.
    server.start()
    run.once("new shape of the update", server.stop)
    life = run.train(1.0)
    step = last_update(run.workdir)
    assert 0 < step < STEPS
    assert_gave_up(life, saved=f": step {step} is saved")
    assert not any((run.workdir / name).exists() for name in FIGURES)
    waiting = run.metrics()[-1]
    assert waiting.pop("step") == step + 1
    (said, *_) = re.findall(r"^waiting for (.*): \d+ % of the episodes of step", life.text, re.MULTILINE)
    for column, share in waiting.items():  # on the terminal, too
        assert f"{column.removeprefix('waiting/')} ({100 * share:.0f} %)" in said

    # The same command goes on, though it begins in the outage.
    run.once("^waiting for ", server.start)
    life = run.train(SECONDS)
    assert life.code == 0, life.text
    assert life.resumed_from == step
    assert_same_figures(run, undisturbed)
    marked = json.loads((run.workdir / "summary.json").read_text())["marked"]
    assert marked and all(f"{expert} failed " in life.text for expert in marked)
    assert [row for row in run.metrics() if any(k.startswith("marked/") for k in row)]


@pytest.mark.slow  # three starts of another command
def test_an_evaluation_through_an_outage_ends_with_the_figures_of_one_without(
    machine: Machine, server: outage.Server, undisturbed: Run, tmp_path: Path
) -> None:
    def evaluate(name: str) -> Life:
        own = [
            f"--checkpoint={undisturbed.workdir}/checkpoints/2",
            f"--output={tmp_path / name}",
            "--samples=2",
            "--baselines",
        ]
        return machine.run("maestro_jax.evaluate", [*undisturbed.flags(1.0), *own])

    assert evaluate("undisturbed").code == 0
    asked = server.answered
    Run(machine, server, tmp_path).once("^policy: ", server.stop)
    assert_gave_up(evaluate("broken"), saved="")
    assert not [path for path in (tmp_path / "broken").iterdir() if path.name.startswith(("evaluation", "accuracy"))]
    server.start()
    assert evaluate("broken").code == 0
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("broken", "undisturbed"))
    assert one | {"latency": {}} == two | {"latency": {}} and one["missing"] == 0
    assert server.answered > asked  # the comparison is not empty
