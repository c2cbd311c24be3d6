"""Starts commands of the package as processes of their own, without paying for their imports every time.

`python -m tests.zygote` imports what commands need and nothing that starts a thread, reads one JSON object a line
({"module", "argv", "environ", "log"}), and forks a child for each, which goes on as `python -m MODULE ARGV...` would.
It writes the child's number, then, when it is over, its exit code (the negative number of the signal that killed it).
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 300  # far above what any command needs: one that hangs fails instead of hanging the suite


class Zygote:
    """A process that is asked for others, one at a time; the environment of all is set before jax is imported."""

    def __init__(self, environ: Mapping[str, str]):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], cwd=ROOT, env=environ, stdin=pipe, stdout=pipe, text=True
        )

    def start(self, module: str, argv: Sequence[str], environ: Mapping[str, str], log: Path) -> int:
        """Starts a command, which writes to `log`; returns the number of its process."""
        request = {"module": module, "argv": list(argv), "environ": dict(environ), "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._child, self._log = self._read(), log
        return self._child

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code of what was started last; kills it and fails with what it wrote where that takes longer."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
            self._read()
            raise AssertionError(f"not over after {seconds} s:\n{self._log.read_text(errors='replace')}")
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            become(**request)
            return
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(module: str, argv: list[str], environ: dict[str, str], log: str) -> None:
    """Goes on as another command; it ends this process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.environ |= environ
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import maestro_jax.checkpoint.store
    import maestro_jax.evaluation.policy
    import maestro_jax.grpo.learner
    import maestro_jax.jobs.train
    import maestro_jax.rollout.supply
    import maestro_jax.warm_start.finetune  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "an import starts a thread, which a fork would lose"
    serve()
