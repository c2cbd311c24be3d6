"""Code graded by its tests (HumanEval-V), in the sandbox that experts' programs run in.

In: an answer that holds a program, and the task's test program. Out: a `TestRun`, and its verdict. A program passes if
the tests ran to their end (sandbox/tested.py), so leaving early is no way to pass.

Source: HumanEval-V/HumanEval-V-Benchmark evaluate.py (`post_process`: the last fenced block that defines the function;
the signature with its imports stands in front, the tests behind) and execution.py (2 s a program).
"""

import asyncio
import atexit
import dataclasses
import re
from collections.abc import Sequence

from maestro_jax.errors import ConfigError
from maestro_jax.sandbox.choose import make_sandbox
from maestro_jax.sandbox.interface import Limits, Sandbox
from maestro_jax.sandbox.tested import Verdict, run_tests
from maestro_jax.types import Task
from maestro_jax.waiting import run_to_end

CPU_SECONDS = 2.0  # as in the authors' execution.py
_ATTEMPTS = 2  # where the sandbox itself fails

# Possessive: two runs of spaces that may share one would be tried in every division of it.
_FENCE = re.compile(r"```[ \t]*+([A-Za-z0-9_+-]*+)[ \t]*+\r?\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")
_FUNCTION = re.compile(r"^def solution\b", re.MULTILINE)

# The names that the published signatures import; a program that imports from the future has to do so first.
_PREAMBLE = "from typing import *\n"


@dataclasses.dataclass(frozen=True)
class TestRun:
    """Does `program` pass `tests`, which run behind it with its names?"""

    __test__ = False  # not a class of tests for pytest

    program: str
    tests: str


def passes_tests(task: Task, answer: str) -> bool | TestRun:
    """The program of an answer, to be run with the task's tests (its one gold answer)."""
    program = program_in(answer)
    return TestRun(program, "\n".join(task.answers)) if program.strip() and any(task.answers) else False


def program_in(answer: str) -> str:
    """The last fenced block that defines `solution`, else the last one in Python or no language, else all of it."""
    blocks = [body for language, body in _FENCE.findall(answer) if language.casefold() in _PYTHON]
    if not blocks:
        return "" if "```" in answer else answer
    return next((body for body in reversed(blocks) if _FUNCTION.search(body)), blocks[-1])


class Programs:
    """Runs programs, as many at a time as there are cores; the sandbox is made for the first one.

    Args:
      kind: of the sandbox (sandbox/choose.py).
    """

    def __init__(self, kind: str):
        self._kind = kind
        self._opened: tuple[Sandbox, asyncio.Runner] | None = None

    def open(self) -> None:
        """Makes the sandbox (5 s).

        Raises:
          ConfigError: there is none here.
        """
        if self._opened is not None:
            return
        try:
            self._opened = make_sandbox(self._kind), asyncio.Runner()
        except ConfigError as error:
            raise ConfigError(
                f"answers that are programs are run in a sandbox; install maestro_jax[sandbox] ({error})"
            ) from error
        atexit.register(self.close)

    def decide(self, runs: Sequence[TestRun]) -> list[bool]:
        """Whether each passes, in order.

        Raises:
          ConfigError: there is no sandbox here, or it cannot run programs any more.
        """
        if not runs:
            return []
        self.open()
        assert self._opened is not None
        sandbox, runner = self._opened
        return run_to_end(self._decide(sandbox, runs), runner.run)

    def close(self) -> None:
        """Removes what the sandbox keeps on disk; the next program would make a new one."""
        if self._opened is not None:
            sandbox, runner = self._opened
            run_to_end(sandbox.close(), runner.run)
            runner.close()
        self._opened = None

    async def _decide(self, sandbox: Sandbox, runs: Sequence[TestRun]) -> list[bool]:
        return await asyncio.gather(*(passes(sandbox, run) for run in runs))


async def passes(sandbox: Sandbox, run: TestRun) -> bool:
    """Whether the tests ran to their end without an error.

    Raises:
      ConfigError: the sandbox itself fails, which says nothing about the program.
    """
    preamble = "" if "from __future__" in run.program else _PREAMBLE
    limits = Limits(cpu_seconds=CPU_SECONDS)
    for _ in range(_ATTEMPTS):
        judged = await run_tests(sandbox, preamble + run.program, run.tests, limits)
        if judged.verdict is not Verdict.UNAVAILABLE:
            return judged.verdict is Verdict.PASSED
    raise ConfigError(f'the sandbox "{sandbox.name}" cannot run programs; free disk space, memory or processes')
