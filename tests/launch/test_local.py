"""Several processes on this machine: what they are told, what is passed on, how they end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/local/run.py"
SECONDS = 60


def launch(*arguments: str, code: str) -> subprocess.Popen[str]:
    command = [str(SCRIPT), *arguments, "--", sys.executable, "-c", f"import os, sys, time, signal\n{code}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_dry_run_prints_commands_that_can_be_pasted() -> None:
    process = launch("--processes=2", "--devices=3", "--dry-run", code="print(*[os.environ['MAESTRO_PROCESS']])")
    lines = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0 and "device_count=3" in lines
    assert subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True).stdout == "0\n1\n"


def test_lines_tell_their_process() -> None:
    names = ("MAESTRO_PROCESSES", "MAESTRO_PROCESS", "MAESTRO_COORDINATOR")
    process = launch("--processes=3", code=f"print(*[os.environ[name] for name in {names}])")
    lines = sorted(process.communicate(timeout=SECONDS)[0].splitlines())
    assert [line[:6] for line in lines] == ["0: 3 0", "1: 3 1", "2: 3 2"]
    assert len({line[6:] for line in lines}) == 1 and " 127.0.0.1:" in lines[0]


@pytest.mark.parametrize(
    ("codes", "code"),
    [((0, 0), 0), ((69, 78), 78), ((75, 69), 75), ((0, 3), 3), ((75, 70), 70)],
)
def test_the_code_that_says_what_to_do(codes: tuple[int, int], code: int) -> None:
    process = launch("--processes=2", code=f"sys.exit({codes}[int(os.environ['MAESTRO_PROCESS'])])")
    process.communicate(timeout=SECONDS)
    assert process.returncode == code


def test_a_process_that_was_killed() -> None:
    process = launch("--processes=1", code="os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=SECONDS)
    assert process.returncode == 137


def test_signals_reach_all() -> None:
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(600)"
    process = launch("--processes=2", code=code)
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"0: ready\n", "1: ready\n"}
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 75 and time.monotonic() - began < SECONDS


def test_no_processes_are_refused() -> None:
    process = launch("--processes=0", code="")
    assert "--processes=0: at least 1" in process.communicate(timeout=SECONDS)[0] and process.returncode == 2
