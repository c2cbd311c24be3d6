"""Starts several processes of a module on this machine, found by the environment; each with one fake device."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.conftest import FLAGS

ROOT = Path(__file__).parents[2]


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


class Started:
    """A process and what it has written so far."""

    def __init__(self, arguments: Sequence[str], environ: dict[str, str], log: Path, devices: int = 1):
        flags = [flag for flag in FLAGS if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"} | environ,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit code; fails with what it wrote where it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None


def told(address: str, count: int, number: int) -> dict[str, str]:
    """What tells a process where it belongs."""
    return {"MAESTRO_COORDINATOR": address, "MAESTRO_PROCESSES": str(count), "MAESTRO_PROCESS": str(number)}


@contextlib.contextmanager
def started(arguments: Sequence[str], directory: Path, count: int = 2, devices: int = 1) -> Iterator[list[Started]]:
    """All processes of a cluster; whoever is left at the end is killed."""
    address = free_address()
    logs = [directory / f"{number}.log" for number in range(count)]
    running = [Started(arguments, told(address, count, n), log, devices) for n, log in enumerate(logs)]
    try:
        yield running
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()


def wait_until(true: Callable[[], bool], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)
