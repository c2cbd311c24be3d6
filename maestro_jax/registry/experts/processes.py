"""Specialists in processes of their own: one that crashes or hangs ends alone, and is started again.

    python -m maestro_jax.registry.experts.processes        # what `HostedSpecialist` starts; not for the command line

In this process, a `HostedSpecialist` stands for the instance in the other one. They exchange packets over pipes: what
to build, then one reply for each request. A packet is a line of JSON with the bytes of its images behind it. Not
`multiprocessing`: its new processes import the main module, which for a run is JAX and all else, and its pools cannot
end one worker alone.
"""

import ast
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import IO, Any

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.interface import Message
from maestro_jax.registry.experts.implementations import MAX_TEXT, SpecialistError, answer, build, run

MAX_LINE = 12 * MAX_TEXT + 2**16  # bytes of a reply, which writes a character in at most 12
BUFFER = 2**20  # bytes; a line is read in pieces of that size
# Started by it, a program hears no signal that asks a run to stop. Slurm sends SIGTERM to every process of a job, and a
# run that saves first still needs its own. They end with their pipes, or by SIGKILL.
UNDISTURBED = ("sh", "-c", 'trap "" TERM INT; exec "$@"', "sh")
QUOTE = 4000  # characters of a traceback

Packet = tuple[dict[str, Any], list[bytes]]  # what is told, and images


class HostedSpecialist:
    """An instance of a class in a process of its own, with the methods of the class.

    One thread at a time calls its methods; `kill` and `close` may come from any other one.

    Args:
      where: opens errors about its configuration.
      options: of the class; literals of Python.
    """

    def __init__(self, where: str, implementation: str, options: Mapping[str, Any]):
        self._order = {"where": where, "implementation": implementation, "options": repr(dict(options))}
        self._lock = threading.Lock()  # for what `kill` and `close` use, too
        self._process: subprocess.Popen[bytes] | None = None
        self._doomed = False  # it was killed, also if it is not dead yet
        self._closed = False
        self._launch()

    def ready(self) -> None:
        """Returns when the instance is built, in a process that has just begun.

        Raises:
          ConfigError: it cannot be built.
          SpecialistError: the process has ended.
        """
        said, _ = self._hear()
        if "error" in said:
            self.end()
            raise ConfigError(said["error"])

    def restart_if_ended(self) -> None:
        """Returns when there is an instance again; raises as `ready` does."""
        if self._process is None or self._doomed or self._process.poll() is not None:
            self.end()
            self._launch()
            self.ready()

    def answer(self, messages: Sequence[Message]) -> str:
        """As the class does, or raises SpecialistError."""
        told = [{"role": m.role, "text": m.text, "images": len(m.images)} for m in messages]
        said, _ = self._ask({"messages": told}, [image for m in messages for image in m.images])
        return str(said["text"])

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        """As the class does, or raises SpecialistError."""
        said, made = self._ask({"text": text}, images)
        return str(said["text"]), tuple(made)

    def kill(self) -> None:
        """Ends the process in the middle of what it does; the method that waits for it raises."""
        with self._lock:
            self._doomed = True
            if self._process is not None:
                _kill(self._process)

    def close(self) -> None:
        """Ends the process for good."""
        with self._lock:
            self._closed = True
        self.kill()

    def end(self) -> int:
        """Ends the process and all that it started; its exit code. For the thread that calls the methods."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return 0
        _kill(process)
        with contextlib.suppress(OSError), process:  # closes its pipes, waits for it
            pass
        return process.wait()

    def _launch(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with self._lock:
            if self._closed:
                raise SpecialistError("it is closed")
            self._doomed = False
            self._process = subprocess.Popen(
                [*UNDISTURBED, sys.executable, "-m", "maestro_jax.registry.experts.processes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=BUFFER,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        self._tell(self._order, ())

    def _ask(self, told: Mapping[str, Any], images: Sequence[bytes]) -> Packet:
        if self._process is None:
            raise SpecialistError("its process could not be started again")
        self._tell(told, images)
        said, made = self._hear()
        if "error" in said:
            raise SpecialistError(said["error"])
        return said, made

    def _tell(self, told: Mapping[str, Any], images: Sequence[bytes]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `_hear` will say so
            _write(self._process.stdin, told, images)

    def _hear(self) -> Packet:
        assert self._process is not None and self._process.stdout is not None
        try:
            return _read(self._process.stdout, MAX_LINE)
        except EOFError:
            raise SpecialistError(f"its process has ended (exit code {self.end()})") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # its number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


# ---- packets -----------------------------------------------------------------------------------------------


def _write(pipe: IO[bytes], told: Mapping[str, Any], images: Sequence[bytes] = ()) -> None:
    pipe.write(json.dumps({**told, "sizes": [len(image) for image in images]}).encode("ascii") + b"\n")
    for image in images:
        pipe.write(image)
    pipe.flush()


def _read(pipe: IO[bytes], most: int = -1) -> Packet:
    """Raises EOFError where the other side has ended."""
    line = pipe.readline(most)
    if not line.endswith(b"\n"):
        raise EOFError
    told: dict[str, Any] = json.loads(line)
    images = [pipe.read(size) for size in told["sizes"]]
    if [len(image) for image in images] != told["sizes"]:
        raise EOFError
    return told, images


# ---- the other process -------------------------------------------------------------------------------------


def main() -> None:
    """Builds what the first packet says, and replies to every further one."""
    requests, replies = os.fdopen(os.dup(0), "rb", BUFFER), os.fdopen(os.dup(1), "wb", BUFFER)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a specialist prints is no reply
    packets: queue.SimpleQueue[Packet] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(requests, packets), daemon=True).start()
    order, _ = packets.get()
    try:
        specialist = build(order["where"], order["implementation"], ast.literal_eval(order["options"]))
    except ConfigError as error:
        return _write(replies, {"error": str(error)})
    _write(replies, {})
    while True:
        _write(replies, *_outcome(specialist, *packets.get()))


def _take(requests: IO[bytes], packets: "queue.SimpleQueue[Packet]") -> None:
    """Passes requests on. When there are no more, whoever would read a reply is gone, and so does this process."""
    with contextlib.suppress(EOFError):
        while True:
            packets.put(_read(requests))
    os._exit(0)


def _outcome(specialist: Any, told: dict[str, Any], images: list[bytes]) -> Packet:
    try:
        if "messages" in told:
            left = iter(images)
            messages = [Message(m["role"], m["text"], tuple(islice(left, m["images"]))) for m in told["messages"]]
            return {"text": answer(specialist, messages)}, []
        text, made = run(specialist, tuple(images), told["text"])
        return {"text": text}, list(made)
    except BaseException:  # foreign code; SystemExit must not end the process, as it does not end a thread's
        return {"error": traceback.format_exc()[-QUOTE:]}, []


if __name__ == "__main__":
    main()
