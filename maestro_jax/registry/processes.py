"""Specialists in processes of their own: one that crashes or hangs ends alone, and is started again.

    python -m maestro_jax.registry.processes        # what `HostedSpecialist` starts; not for the command line

In this process, a `HostedSpecialist` stands for the instance in the other one. They exchange lines of JSON over pipes,
images as base64: what to build, then one reply for each request. Not `multiprocessing`: its new processes import the
main module, which for a run is JAX and all else, and its pools cannot end one worker alone.
"""

import ast
import base64
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
from typing import IO, Any

from maestro_jax.errors import ConfigError
from maestro_jax.registry.implementations import MAX_IMAGES, MAX_TEXT, SpecialistError, answer, build, run
from maestro_jax.registry.interface import Message

MAX_LINE = 12 * MAX_TEXT + 2 * MAX_IMAGES  # bytes: JSON writes a character in at most 12, base64 three bytes in four
QUOTE = 4000  # characters of a traceback


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
        if "error" in (said := self._hear()):
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
        told = [{"role": m.role, "text": m.text, "images": _written(m.images)} for m in messages]
        return str(self._ask({"messages": told})["text"])

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        """As the class does, or raises SpecialistError."""
        made = self._ask({"images": _written(images), "text": text})
        return made["text"], _read(made["images"])

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
                [sys.executable, "-m", "maestro_jax.registry.processes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        self._tell(self._order)

    def _ask(self, told: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None:
            raise SpecialistError("its process could not be started again")
        self._tell(told)
        found = self._hear()
        if "error" in found:
            raise SpecialistError(found["error"])
        return found

    def _tell(self, told: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `_hear` will say so
            self._process.stdin.write(_line(told))
            self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise SpecialistError(f"its process has ended (exit code {self.end()})")
        found: dict[str, Any] = json.loads(line)
        return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # its number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


# ---- lines -------------------------------------------------------------------------------------------------


def _line(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told).encode("ascii") + b"\n"


def _written(images: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(image).decode("ascii") for image in images]


def _read(images: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(base64.b64decode(image) for image in images)


# ---- the other process -------------------------------------------------------------------------------------


def main() -> None:
    """Builds what the first line says, and replies to every further line with one."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a specialist prints is no reply
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(requests, lines), daemon=True).start()

    def reply(told: Mapping[str, Any]) -> None:
        replies.write(_line(told))
        replies.flush()

    order = json.loads(lines.get())
    try:
        specialist = build(order["where"], order["implementation"], ast.literal_eval(order["options"]))
    except ConfigError as error:
        return reply({"error": str(error)})
    reply({})
    while True:
        reply(_outcome(specialist, json.loads(lines.get())))


def _take(requests: IO[bytes], lines: "queue.SimpleQueue[bytes]") -> None:
    """Passes lines on. When there are no more, whoever would read a reply is gone, and so does this process."""
    for line in requests:
        lines.put(line)
    os._exit(0)


def _outcome(specialist: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if "messages" in told:
            messages = [Message(m["role"], m["text"], _read(m["images"])) for m in told["messages"]]
            return {"text": answer(specialist, messages)}
        made, images = run(specialist, _read(told["images"]), told["text"])
        return {"text": made, "images": _written(images)}
    except BaseException:  # foreign code; SystemExit must not end the process, as it does not end a thread's
        return {"error": traceback.format_exc()[-QUOTE:]}


if __name__ == "__main__":
    main()
