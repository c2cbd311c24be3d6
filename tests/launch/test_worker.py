"""The service on a worker, against a systemd of the tests' own."""

import subprocess

import pytest

from tests.launch.conftest import FAKES, FAST_PYTHON, Cloud


@pytest.fixture
def worker(cloud: Cloud) -> Cloud:
    """A machine with nothing on it."""
    for name in ("systemctl", "systemd-run"):
        cloud.program(name, f'exec {FAST_PYTHON} {FAKES}/systemd.py {name} "$@"')
    cloud.program("sudo", 'exec "$@"')
    for name in ("dpkg", "sleep"):
        cloud.program(name, "exit 0")
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
    assert "--property=UMask=0000" in started  # users have other numbers elsewhere
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


def test_setup_installs_once_and_again_when_requirements_change(worker: Cloud) -> None:
    (worker.directory / "maestro").mkdir()
    worker.lines("maestro/requirements.txt", "jax==0.10.2")
    worker.lines("maestro/setup.py", "setup()")
    uv_venv = 'case "$*" in *"uv venv"*) mkdir -p .venv ;; esac'
    worker.program("python3", 'echo python3 "$@" >>"$FAKE_CLOUD/calls"', uv_venv)
    for expected in (1, 1):
        assert say(worker, "setup").returncode == 0
        assert len(worker.calls("uv pip install")) == expected
    worker.lines("maestro/requirements.txt", "jax==0.10.3")
    assert "is ready" in say(worker, "setup").stdout
    assert len(worker.calls("uv pip install")) == 2


def test_setup_mounts_the_share_once(worker: Cloud) -> None:
    worker.program("mount", 'echo mount "$@" >>"$FAKE_CLOUD/calls"')
    worker.program("mountpoint", 'test -e "$FAKE_CLOUD/mounted"')
    worker.program("chmod", 'echo chmod "$@" >>"$FAKE_CLOUD/calls"')
    worker.program("stat", "echo 755")
    worker.program("mkdir", "exit 0")
    say(worker, "setup 10.0.0.2:/maestro")
    assert worker.calls("mount -t") == ["mount -t nfs -o hard 10.0.0.2:/maestro /mnt/maestro"]
    worker.lines("mounted")
    worker.program("stat", "echo 777")
    say(worker, "setup 10.0.0.2:/maestro")
    assert len(worker.calls("mount -t")) == 1
    assert worker.calls("chmod") == ["chmod 777 /mnt/maestro"]  # not of one user, who has another number elsewhere


def test_setup_outlasts_a_machine_that_updates_itself(worker: Cloud) -> None:
    worker.program("dpkg", "exit 1")
    worker.program("apt-get", 'echo apt-get "$@" >>"$FAKE_CLOUD/calls"', f"exec {FAST_PYTHON} {FAKES}/held.py")
    worker.lines("holds", *["E: Could not get lock /var/lib/apt/lists/lock."] * 3)
    say(worker, "setup")  # it ends at the environment, of which nothing is here
    assert len(worker.calls("apt-get", " update")) == 4
    (installed,) = worker.calls("apt-get", " install ")
    assert installed.endswith("nfs-common libgl1 libglib2.0-0")


def test_an_unknown_command_is_refused(worker: Cloud) -> None:
    assert say(worker, "restart").returncode == 78
