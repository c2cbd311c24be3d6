"""The main job in two processes, started as `launch/local` does: its results are those of one process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.errors import EXIT_PREEMPTED
from maestro_jax.observe.metrics import read_metrics
from tests.main_job import ROOT, TINY, without_times

SECONDS = 500  # far above what is needed
PROMISE = 15  # seconds in which a lost process ends the others
STEPS = 4
BOTH = {"mesh.fsdp": -1, "grpo.groups": 4, "checkpoint.every": 1, "checkpoint.keep": 5}
# Nothing but what two processes do together. The policy is random, so the entropy has to give the gradient.
BARE = BOTH | {
    "warm_start.steps": 0,
    "grpo.steps": 2,
    "grpo.group_size": 2,
    "grpo.entropy_weight": 0.1,
    "evaluate.tasks": 2,
    "evaluate.batch": 2,
    "evaluate.every": 2,
}
# With calls and contrast, and with a KL term, so that all groups are trained on: a plan for one process moves those
# that are left between devices, one for two cannot.
WHOLE = BOTH | {"grpo.steps": STEPS, "grpo.kl_weight": 0.1, "evaluate.batch": 6, "evaluate.every": 2}


def command(shared: Path, workdir: Path, settings: dict[str, Any], processes: int) -> list[str]:
    """Two devices in all."""
    settings = TINY | {"data.suite_directory": shared / "suite"} | settings
    launcher = [f"--processes={processes}", f"--devices={2 // processes}", "--"]
    train = [sys.executable, "-m", "maestro_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "launch/local/run.py", *launcher, *train, *flags]


def start(command: list[str], shared: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()
    assert process.returncode == 0, output
    return output


def train(shared: Path, workdir: Path, settings: dict[str, Any], processes: int) -> str:
    return finish(start(command(shared, workdir, settings, processes), shared))


def undo(workdir: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as it was when it had committed `step`."""
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("summary.json", "*.png"))
    for checkpoint in (copy / "checkpoints").glob("[0-9]*"):
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return copy


def fingerprint(workdir: Path, step: int) -> str:
    return json.loads((workdir / "checkpoints" / str(step) / "run" / "run.json").read_text())["fingerprint"]


def assert_equal_runs(one: Path, other: Path, steps: int) -> None:
    """Metrics, what was trained on, and the trained state, bit for bit."""
    first, second = (read_metrics(where / "metrics.jsonl") for where in (one, other))
    assert without_times(first) == without_times(second)
    assert [row["step"] for row in first] == list(range(steps + 1))
    assert all(row["grad_norm"] > 0 for row in first[1:])
    assert (one / "trained.jsonl").read_text() == (other / "trained.jsonl").read_text()
    assert fingerprint(one, steps) == fingerprint(other, steps)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


# ---- what CI runs ------------------------------------------------------------------------------------------------


def test_two_processes_train_and_one_goes_on(shared: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    output = train(shared, two, BARE, processes=2)
    assert "\n0: train 1/2 " in output and "1: train" not in output  # one of them speaks
    assert (two / "journal.1.jsonl").is_file() and not (two / "metrics.1.jsonl").exists()
    one = undo(two, tmp_path / "one", step=1)
    assert "resumed from the checkpoint of step 1" in train(shared, one, BARE, processes=1)
    assert_equal_runs(two, one, steps=2)


# ---- the whole job -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("straight")
    train(shared, workdir, WHOLE, processes=2)
    return workdir


@pytest.mark.slow
def test_two_processes_equal_one(shared: Path, straight: Path, tmp_path: Path) -> None:
    train(shared, tmp_path / "one", WHOLE, processes=1)
    assert_equal_runs(straight, tmp_path / "one", STEPS)
    assert sum(row["calls"] > 0 for row in read_metrics(straight / "metrics.jsonl")[1:]) > 1


@pytest.mark.slow
def test_two_processes_go_on_from_one(shared: Path, straight: Path, tmp_path: Path) -> None:
    train(shared, tmp_path / "one", WHOLE, processes=1)
    two = undo(tmp_path / "one", tmp_path / "two", step=2)
    assert "resumed from the checkpoint of step 2" in train(shared, two, WHOLE, processes=2)
    assert_equal_runs(straight, two, STEPS)


@pytest.mark.slow
def test_two_processes_stream_what_one_does(shared: Path, tmp_path: Path) -> None:
    settings = WHOLE | {"grpo.stream": True, "grpo.microbatches": 2}
    for processes in (1, 2):
        train(shared, tmp_path / str(processes), settings, processes)
    assert_equal_runs(tmp_path / "1", tmp_path / "2", STEPS)


def at_step(process: subprocess.Popen[str], step: int) -> None:
    """Returns when process 0 reports `step`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"0: train {step}/"):
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_nothing_is_lost(
    victim: int, shared: Path, straight: Path, tmp_path: Path
) -> None:
    process = start(command(shared, tmp_path, WHOLE, processes=2), shared)
    at_step(process, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[victim]), signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < PROMISE
    assert process.returncode not in (0, EXIT_PREEMPTED)
    assert re.search(r"resumed from the checkpoint of step [12]\n", train(shared, tmp_path, WHOLE, processes=2))
    assert_equal_runs(straight, tmp_path, STEPS)


@pytest.mark.slow
def test_ahead_of_their_step_groups_are_trained_once(shared: Path, tmp_path: Path) -> None:
    """Stopped while the tasks of two steps are under way; which groups a step takes depends on who answers first."""
    settings = WHOLE | {"rollout.ahead": 1, "rollout.staleness": 2, "grpo.importance_cap": 2.0}
    process = start(command(shared, tmp_path, settings, processes=2), shared)
    at_step(process, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == EXIT_PREEMPTED, output
    assert "resumed from the checkpoint of step" in train(shared, tmp_path, settings, processes=2)
    trained = [group["task"] for row in read_metrics(tmp_path / "trained.jsonl") for group in row["groups"]]
    assert len(trained) == len(set(trained)) == STEPS * WHOLE["grpo.groups"]


@pytest.mark.slow
def test_a_signal_stops_all_processes_where_nothing_is_lost(shared: Path, straight: Path, tmp_path: Path) -> None:
    process = start(command(shared, tmp_path, WHOLE | {"checkpoint.every": 3}, processes=2), shared)
    at_step(process, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == EXIT_PREEMPTED, output
    saved = {match for match in re.findall(r"^(\d): stopped by .*: step (\d) is saved", output, re.MULTILINE)}
    assert len(saved) == 2 and len({step for _, step in saved}) == 1  # they agree
    assert f"resumed from the checkpoint of step {saved.pop()[1]}" in train(shared, tmp_path, WHOLE, processes=2)
    assert_equal_runs(straight, tmp_path, STEPS)


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(shared: Path, straight: Path, tmp_path: Path) -> None:
    results = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        made = command(shared, straight, WHOLE, processes)
        made[made.index("maestro_jax.train")] = "maestro_jax.evaluate"
        made[made.index(f"--workdir={straight}")] = f"--checkpoint={straight}"
        finish(start([*made, f"--output={output}", "--samples=2", "--baselines"], shared))
        results.append(json.loads((output / "evaluation.json").read_text()))
    assert (tmp_path / "2" / "episodes.jsonl").is_file()
    drop_times(results)
    assert results[0] == results[1]


def drop_times(value: Any) -> None:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        drop_times(inner)
    if isinstance(value, dict):
        for name in [name for name in value if "seconds" in name or "latency" in name]:
            del value[name]
