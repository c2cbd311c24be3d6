"""A run on a machine that is taken away: the loop asks for another one, and the run goes on where it was."""

import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.conftest import FAKES, FAST_PYTHON, Cloud

STEPS = 30  # enough for the signal to come in between
LOOP = (
    "tpu_queued/loop.sh --name=run1 --zone=us-west4-a --accelerator=v5litepod-1 --spot --config=configs/quickstart.py"
)
SETTINGS = (
    "--config.data.train_per_domain=8 --config.data.test_per_domain=4 --config.warm_start.steps=4 "
    f"--config.grpo.steps={STEPS} --config.grpo.groups=4 --config.grpo.group_size=4 --config.evaluate.batch=20 "
    "--config.evaluate.every=30 --config.checkpoint.every=2"
)


@pytest.fixture
def machine(cloud: Cloud) -> Cloud:
    """What one worker of a TPU VM has; the run itself is a true one."""
    (cloud.directory / "machine").mkdir()
    for name in ("systemctl", "systemd-run", "journalctl"):
        cloud.program(name, f'exec {FAST_PYTHON} {FAKES}/machine.py {name} "$@"')
    cloud.program("sudo", 'exec "$@"')
    for name in ("mountpoint", "dpkg"):
        cloud.program(name, "exit 0")
    cloud.program("stat", "echo 777")
    cloud.program("this-python", f'exec {sys.executable} "$@"')  # with its packages, unlike a link
    venv = f"mkdir -p .venv/bin && ln -sf {cloud.directory}/bin/this-python .venv/bin/python"
    cloud.program("python3", f'case "$*" in *"uv venv"*) {venv} ;; esac')
    return cloud


def wait_for_steps(workdir: Path, steps: int, loop: Future) -> None:
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        if loop.done():
            raise AssertionError(loop.result().stderr)
        time.sleep(0.2)


def test_a_new_machine_is_idle(machine: Cloud) -> None:
    """Before anything is set up there is nothing to ask."""
    assert machine.launch("tpu_vm/status.sh --name=run1 --zone=us-west4-a").stdout == "idle\n"


@pytest.mark.slow
def test_a_run_outlives_its_machine(machine: Cloud) -> None:
    workdir, home = machine.directory / "share" / "run1", machine.directory / "machine"
    machine.lines("queue", "WAITING_FOR_RESOURCES ACTIVE", "PROVISIONING ACTIVE")
    command = f"{LOOP} --share=10.0.0.2:/maestro --workdir={workdir} --delete-when-done -- {SETTINGS}"
    with ThreadPoolExecutor() as pool:
        loop = pool.submit(machine.launch, command, seconds=900, MAESTRO_PAUSE="1", USER="someone")
        wait_for_steps(workdir, 3, loop)
        # A machine that goes down: SIGTERM, time to save, then it is gone with its disk.
        machine.lines("queued/run1", "SUSPENDING")
        os.kill(int((home / "pid").read_text()), signal.SIGTERM)
        while "running" in (home / "unit").read_text():
            time.sleep(0.02)
        assert "ExecMainStatus=75" in (home / "unit").read_text()
        machine.lines("queued/run1", "SUSPENDED")
        shutil.rmtree(home)
        home.mkdir()
        result = loop.result()
    assert result.returncode == 0, result.stderr
    assert len(machine.calls("queued-resources create")) == 2 and len(machine.calls("worker.sh setup")) == 2
    assert machine.calls("queued-resources delete")[-1:] == machine.calls()[-1:]  # told so, at the end
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert (workdir / "summary.json").exists()
