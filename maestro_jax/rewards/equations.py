"""Equations decided by algebra: math-verify in processes of its own, several at a time.

In: expressions, foreign text. Out: verdicts. Processes start with the first equation and end with the interpreter. An
equation gets `equation_server.CPU_SECONDS` of computing and `equation_server.MEMORY_BYTES`; what needs more is not
equal. A process that does not answer in time is killed, and another takes its place.
"""

import atexit
import concurrent.futures
import importlib.util
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
from collections.abc import Sequence

from maestro_jax.errors import ConfigError
from maestro_jax.registry.experts.processes import UNDISTURBED
from maestro_jax.rewards.maths import Equation

MAX_PROCESSES = 4
START_SECONDS = 300.0  # 3 s on an idle core
ANSWER_SECONDS = 60.0  # of waiting: the limit on computing ends long before, unless the machine stands still
_ATTEMPTS = 2

_CURE = "install math-verify, which maestro_jax needs (requirements.txt)"

logger = logging.getLogger(__name__)


class Equations:
    """Processes that decide equations; none until the first one.

    Args:
      processes: at most so many at a time; by default one a core, up to `MAX_PROCESSES`.
    """

    def __init__(self, processes: int = min(MAX_PROCESSES, os.cpu_count() or 1)):
        self._processes = processes
        self._idle: queue.LifoQueue[_Server | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        atexit.register(self.close)

    def decide(self, equations: Sequence[Equation]) -> list[bool]:
        """Whether each holds, in order.

        Raises:
          ConfigError: math-verify is missing.
        """
        if not equations:
            return []
        with concurrent.futures.ThreadPoolExecutor(self._processes) as pool:
            return list(pool.map(self._decide, equations))

    def close(self) -> None:
        """Ends the processes; the next equation would start new ones."""
        servers = [self._idle.get() for _ in range(self._processes)]
        for server in servers:
            if server is not None:
                server.kill()
            self._idle.put(None)

    def _decide(self, equation: Equation) -> bool:
        server = self._idle.get()
        try:
            for _ in range(_ATTEMPTS):
                server = server or _Server()
                verdict = server.ask(equation)
                if verdict is not None:
                    return verdict
                logger.warning("a process that compares answers is gone or hangs, and is replaced")
                server.kill()
                server = None
        finally:
            self._idle.put(server)
        return False


def check_installed() -> None:
    """Raises ConfigError if equations cannot be decided here."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(f"answers in LaTeX are compared by math-verify, which is missing; {_CURE}")


class _Server:
    """One process of `equation_server`.

    Raises:
      ConfigError: it does not start.
    """

    def __init__(self) -> None:
        check_installed()
        self._process = subprocess.Popen(
            [*UNDISTURBED, sys.executable, "-P", "-m", "maestro_jax.rewards.equation_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        if self._line(START_SECONDS) != b"ready":
            self.kill()
            assert self._process.stderr is not None
            reason = self._process.stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise ConfigError(f"the process that compares answers in LaTeX does not start ({reason}); {_CURE}")

    def ask(self, equation: Equation) -> bool | None:
        """Whether it holds; None if the process is gone or does not answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([equation.answer, *equation.golds]).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return {b"equal": True, b"different": False}.get(self._line(ANSWER_SECONDS))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self, seconds: float) -> bytes:
        """The next line it writes, whole; empty after `seconds`. Lines are short and written at once."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return os.read(self._process.stdout.fileno(), 64).strip() if selector.select(seconds) else b""
