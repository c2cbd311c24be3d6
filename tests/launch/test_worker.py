"""The service on a worker, against a systemd of the tests' own."""

import subprocess
import sys

import pytest

from tests.launch.conftest import FAKES, Cloud


@pytest.fixture
def worker(cloud: Cloud) -> Cloud:
    """A machine with nothing on it."""
    fakes = {name: f"exec {sys.executable} -I -S {FAKES}/systemd.py {name}" for name in ("systemctl", "systemd-run")}
    for name, command in {**fakes, "sudo": "exec"}.items():
        (cloud.directory / "bin" / name).write_text(f'#!/bin/sh\n{command} "$@"\n')
        (cloud.directory / "bin" / name).chmod(0o755)
    return cloud


def say(worker: Cloud, command: str) -> subprocess.CompletedProcess[str]:
    return worker.launch(f"tpu_vm/worker.sh {command}", USER="someone")


def test_status_of_each_end(worker: Cloud) -> None:
    assert say(worker, "status").stdout == "idle\n"
    for code, number, expected in (("1", "0", "0"), ("1", "75", "75"), ("2", "9", "137"), ("3", "6", "134")):
        state = "exited" if number == "0" else "failed"
        worker.lines(
            "unit", "LoadState=loaded", f"SubState={state}", f"ExecMainCode={code}", f"ExecMainStatus={number}"
        )
        assert say(worker, "status").stdout == f"{expected}\n"
    worker.lines("unit", "LoadState=loaded", "SubState=stop-sigterm")  # it is saving
    assert say(worker, "status").stdout == "running\n"


def test_start_twice_starts_once(worker: Cloud) -> None:
    assert say(worker, "start .venv/bin/python -m maestro_jax.train").returncode == 0
    assert "runs already" in say(worker, "start .venv/bin/python -m maestro_jax.train").stdout
    (started,) = worker.calls("systemd-run")
    assert started.endswith(".venv/bin/python -m maestro_jax.train")
    assert "--property=KillMode=mixed" in started and "--property=TimeoutStopSec=300" in started
    assert "EnvironmentFile" not in started


def test_start_after_an_end_makes_room(worker: Cloud) -> None:
    worker.lines("unit", "LoadState=loaded", "SubState=failed", "ExecMainCode=1", "ExecMainStatus=75")
    worker.lines("maestro.env", "CHART_API_KEY=k")
    result = say(worker, "start python")
    assert result.returncode == 0, result.stderr
    assert f"EnvironmentFile={worker.directory}/maestro.env" in worker.calls("systemd-run")[0]


def test_stop_says_how_the_run_ended(worker: Cloud) -> None:
    say(worker, "start python")
    assert say(worker, "stop").stdout == "75\n"
    assert say(worker, "stop").stdout == "75\n"


def test_an_unknown_command_is_refused(worker: Cloud) -> None:
    assert say(worker, "restart").returncode == 78
