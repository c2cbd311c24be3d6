"""A peer's process, from our end: commands go in, results come out."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

_ROOT = Path(__file__).parents[2]

# Nothing is looked up in the network, and jax takes the CPU even where it finds something else.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}


class WorkerError(Exception):
    """The peer's code failed, or its process ended."""


class Worker:
    """A process that runs `module` (see `protocol.py`) until the block ends.

    ```
    with Worker(python, "benchmarks.peers.trl_worker") as worker:
        worker.call("prepare", checkpoint="...")
    ```

    Attributes:
      idle_cpu: processor seconds the process has used while no command was running.
    """

    def __init__(self, python: str | os.PathLike[str], module: str):
        self.module = module
        self.idle_cpu = 0.0
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [os.fspath(python), "-m", module],
            cwd=_ROOT,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """Runs a command and waits for its result.

        Raises:
          WorkerError: with the worker's traceback, or the end of what it wrote if it is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.module} ended at {command!r}; it wrote:\n{self._last_lines()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.module} failed at {command!r}:\n{answer['error']}")
        self.idle_cpu += answer["idle_cpu"]
        return answer["result"]

    def _last_lines(self) -> str:
        self._process.wait()
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-20:])
