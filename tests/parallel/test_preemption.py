"""Signals that ask a command to stop, in processes of their own: where they are heard, and how the command ends."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maestro_jax.errors import EXIT_PREEMPTED

ROOT = Path(__file__).parents[2]
SECONDS = 60  # far above what is needed: a hang fails instead of hanging the suite
SAYS = "SIGTERM: stopping where nothing is lost; a second signal stops at once\n"

HEAD = """
import signal, time, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from maestro_jax import command
from maestro_jax.parallel import preemption
def ready():
    print("ready", flush=True)
def main(argv):
"""
BOUNDARIES = """
    with preemption.at_boundaries():
        ready()
        for _ in range(1000):
            time.sleep(0.01)
            if preemption.requested():
                print("requested", flush=True)
                try:
                    preemption.check()
                except preemption.Preempted as stop:
                    stop.saved = "step 7 is saved"
                    raise
"""
INTERRUPTED = """
    ready()
    time.sleep(1000)
"""
# As XLA compiles: the interpreter runs no handler before the call is over.
DEAF = """
    import ctypes
    mutex = ctypes.create_string_buffer(64)
    with preemption.at_boundaries():
        ready()
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def start(body: str) -> subprocess.Popen[str]:
    script = f"{HEAD}{body}\ncommand.run(main, required=())\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    timer = threading.Timer(SECONDS, process.kill)
    timer.daemon = True
    timer.start()
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    return process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_a_boundary(number: signal.Signals) -> None:
    process = start(BOUNDARIES)
    process.send_signal(number)
    out, err = finish(process)
    assert out == "requested\n"
    told = rf"stopped by {number.name} in \d+\.\d s: step 7 is saved; the same command goes on"
    assert re.fullmatch(told, err.splitlines()[-1])
    assert process.returncode == EXIT_PREEMPTED


def test_elsewhere_it_interrupts() -> None:
    process = start(INTERRUPTED)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    assert re.fullmatch(r"stopped by SIGTERM in \d+\.\d s; the same command goes on\n", err)
    assert process.returncode == EXIT_PREEMPTED


def test_a_second_signal_ends_what_is_deaf() -> None:
    process = start(DEAF)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None and process.stderr.readline() == SAYS
    process.send_signal(signal.SIGTERM)  # passed on by a launcher: the same one
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    assert err == "a second signal: stopped at once; the same command goes on from the last checkpoint\n"
    assert process.returncode == EXIT_PREEMPTED


def test_a_thread_that_hangs_does_not_hold_up_the_end() -> None:
    hangs = "    import threading\n    threading.Thread(target=time.sleep, args=(1000,)).start()\n"
    process = start(hangs + INTERRUPTED)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert process.returncode == EXIT_PREEMPTED


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup`, and background jobs of a script."""
    ignored = HEAD.replace("signal.default_int_handler", "signal.SIG_IGN")
    script = f"{ignored}    import os\n    os.kill(os.getpid(), signal.SIGINT)\ncommand.run(main, required=())\n"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
