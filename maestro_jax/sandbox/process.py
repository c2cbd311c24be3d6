"""What all back ends share: a program as a process of its own, under the kernel's limits, outside the event loop.

A back end says which command runs a directory (`Command`); here the directory is filled, the command started and
judged. Output goes to files, which the kernel keeps short (RLIMIT_FSIZE), so nobody has to read along: a program
that writes too much gets an error from `write`, always at the same byte.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO, Protocol

from maestro_jax.sandbox.interface import Limits, Ran, RanStatus

logger = logging.getLogger(__name__)

PROGRAM = "main.py"  # the program's name in its working directory

# Limits are set by a shell: between fork and exec no Python may run in a process with threads. -f counts blocks of 512.
# SIGTERM is ignored: a scheduler sends it to all processes of a run that it stops, and no program is judged by it.
_LIMITED = 'trap "" TERM; ulimit -c 0; ulimit -n 64; ulimit -f "$1"; ulimit -t "$2"; ulimit -v "$3"; shift 3; exec "$@"'
_BLOCK = 512
# What Python 3.13 writes where there is not even memory for the traceback.
_NO_MEMORY_TO_SAY_SO = "MemoryError()\nlost sys.stderr"
_NO_LIMIT = "unlimited"
_PATIENCE = 10  # times the wall time that a program may wait for a core


@dataclasses.dataclass(frozen=True)
class Command:
    """What runs the program of a directory.

    Attributes:
      environment: all of it; nothing is inherited.
      own_limits: the command keeps to CPU and memory limits by itself; the kernel's would not mean the same.
    """

    arguments: Sequence[str]
    environment: Mapping[str, str]
    own_limits: bool = False


class BackEnd(Protocol):
    """What differs between sandboxes."""

    name: str

    def command(self, directory: str, limits: Limits) -> Command: ...

    def close(self) -> None: ...


class ProcessSandbox:
    """A `Sandbox` that starts a process for every program, no more than there are cores at a time."""

    def __init__(self, back_end: BackEnd):
        self.name = back_end.name
        self._back_end = back_end
        self._free = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Ran:
        check_names(files)
        async with self._free:  # waiting for a turn is no time of the program
            start = time.monotonic()
            try:
                ran = await self._run(program, files, limits, stdin)
            except OSError:
                logger.exception("the %s sandbox could not run a program", self.name)
                ran = Ran("", "", RanStatus.UNAVAILABLE, 0.0)
            return dataclasses.replace(ran, seconds=time.monotonic() - start)

    async def close(self) -> None:
        self._back_end.close()

    async def _run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes) -> Ran:
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as made:
            directory, streams = pathlib.Path(made, "work"), pathlib.Path(made, "streams")
            for name, content in {**files, PROGRAM: program.encode("utf-8", "replace")}.items():
                path = directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            streams.mkdir()
            (streams / "stdin").write_bytes(stdin)
            with (
                open(streams / "stdin", "rb") as given,
                open(streams / "stdout", "w+b") as stdout,
                open(streams / "stderr", "w+b") as stderr,
            ):
                command = self._back_end.command(str(directory), limits)
                process = _start(command, str(directory), limits, (given, stdout, stderr))
                code = await _ended(process, limits.wall_seconds)
                return judge(code, _read(stdout), _read(stderr), limits)


def check_names(files: Mapping[str, bytes]) -> None:
    """Raises ValueError unless every name stays inside the working directory and leaves the program's name free."""
    for name in files:
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or path.parts[0] == PROGRAM:
            raise ValueError(f"file name {name!r} is empty, absolute, leads out, or is {PROGRAM}; use another")


def judge(code: int | None, stdout: bytes, stderr: bytes, limits: Limits) -> Ran:
    """The verdict on a program.

    Args:
      code: as `subprocess` gives it; None if the wall time was used up.
    """
    texts = [found[: limits.output_bytes].decode("utf-8", "replace") for found in (stdout, stderr)]
    written = texts[1].rstrip()
    if max(len(stdout), len(stderr)) > limits.output_bytes:
        status = RanStatus.OUTPUT
    elif code is None or _signal(code) in (signal.SIGXCPU, signal.SIGKILL):
        status = RanStatus.TIMEOUT
    elif code and (written.rpartition("\n")[2].startswith("MemoryError") or written.endswith(_NO_MEMORY_TO_SAY_SO)):
        status = RanStatus.MEMORY
    else:
        status = RanStatus.ERROR if code else RanStatus.OK
    return Ran(texts[0], texts[1], status, 0.0)


def _signal(code: int) -> int:
    """The signal that ended a process: negative from `subprocess`, above 128 through a process that waited for it."""
    return -code if code < 0 else code - 128


def _start(
    command: Command, directory: str, limits: Limits, streams: tuple[IO[bytes], IO[bytes], IO[bytes]]
) -> subprocess.Popen[bytes]:
    blocks = limits.output_bytes // _BLOCK + 1  # one more than may be: that shows who wanted to write more
    cpu, memory = str(math.ceil(limits.cpu_seconds)), str(limits.memory_bytes // 1024)
    if command.own_limits:
        cpu = memory = _NO_LIMIT
    return subprocess.Popen(
        ["sh", "-c", _LIMITED, "sh", str(blocks), cpu, memory, *command.arguments],
        stdin=streams[0],
        stdout=streams[1],
        stderr=streams[2],
        cwd=directory,
        env=dict(command.environment),
        start_new_session=True,
    )


async def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code, None after `seconds`; the whole process group is gone when this returns, also if cancelled."""
    try:
        return await _exit_code(process, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()  # returns at once: it is dead or just killed


async def _exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Waits for a child without a thread of its own; the pause grows with the time it takes.

    Time in which it is ready and has no core does not count: else a busy machine would judge programs. Looked up only
    once the time seems to be over; and among all that has come from the child by then, before the time is over.

    Raises:
      TimeoutError: it waited for a core for `_PATIENCE` times the seconds.
    """
    began, waited, pause = time.monotonic(), 0.0, 0.002
    family = frozenset([process.pid])
    while (code := process.poll()) is None:
        if time.monotonic() - began - waited >= seconds:
            waited = max(map(_waited, family))
            if time.monotonic() - began - waited >= seconds:
                family = await asyncio.to_thread(_family, process.pid)
                waited = max(map(_waited, family))
                if time.monotonic() - began - waited >= seconds:
                    return None
            if waited > _PATIENCE * seconds:
                raise TimeoutError(f"a program waited {waited:.0f} s for a core; run fewer things beside it")
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, 0.05)
    return code


def _family(pid: int) -> frozenset[int]:
    """A process and all that came from it: bubblewrap waits for the program that it starts."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:  # grows meanwhile
        found += children.get(one, [])
    return frozenset(found)


def _waited(pid: int) -> float:
    """Seconds that a process was ready to run and had no core; 0 where the kernel does not say, or it has ended."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/schedstat").read_bytes().split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0


def _read(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
