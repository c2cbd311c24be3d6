"""Functions of the user's that grade or rate: called, and what they give is checked.

    def within_one_percent(task: Task, answer: str) -> bool | float      a grader, 0 to 1
    def brevity(task: Task, episode: EpisodeSummary) -> float            a term of the reward

They are foreign code. One that raises, or gives something else, ends the run with one line that names it and the task.
A grader that is slow or unsafe runs in processes of its own, where a limit ends it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import math
import numbers
import queue
import signal
import threading
from collections.abc import Sequence
from typing import Any

from maestro_jax.errors import ConfigError, UserError
from maestro_jax.plugins import load, one_line
from maestro_jax.registry.description.interface import Message
from maestro_jax.registry.experts.implementations import SpecialistError
from maestro_jax.registry.experts.processes import HostedSpecialist
from maestro_jax.types import Task

# Of waiting, beside the limit on computing: reached only by a grader that sleeps, or by a machine that stands still.
WAIT_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Own:
    """A function of the user's.

    Attributes:
      where: what errors call it, such as "config.graders.my_source".
      path: "package.module:name".
    """

    where: str
    path: str

    def __post_init__(self) -> None:
        _ = self.function

    @functools.cached_property
    def function(self) -> Any:
        return load(self.path, self.where)

    def __call__(self, task: Task, given: Any) -> Any:
        """What it gives.

        Raises:
          ConfigError: it raised.
        """
        try:
            return self.function(task, given)
        except UserError:
            raise
        except Exception as error:  # foreign code
            raise ConfigError(f"{self._named(task)} raised an error ({one_line(error)}); correct it") from error

    def number(self, task: Task, given: Any, low: float, high: float, wanted: str) -> float:
        """What it gives, a number between two others.

        Raises:
          ConfigError: it raised, or gave something else.
        """
        return self.checked(task, self(task, given), low, high, wanted)

    def checked(self, task: Task, found: Any, low: float, high: float, wanted: str) -> float:
        is_number = isinstance(found, numbers.Real) or type(found).__name__ in ("bool_", "bool")  # numpy's is none
        value = math.nan
        with contextlib.suppress(OverflowError):  # an integer may be too large for a float
            value = float(found) if is_number else math.nan
        if not math.isfinite(value) or not low <= value <= high:
            try:
                shown = f"{found!r:.60}"
            except Exception:  # foreign code; and Python refuses to print integers of thousands of digits
                shown = f"a value of type {type(found).__name__}"
            raise ConfigError(f"{self._named(task)} gave {shown}; correct it, so that it gives {wanted}")
        return value

    def _named(self, task: Task) -> str:
        return f'{self.where}: {self.path} on task "{task.id}"'


OUTCOME = 0.0, 1.0, "True, False or a number from 0 to 1"


class HostedGrader:
    """A grader of the user's in processes of its own, several answers at a time.

    An answer that uses up `seconds` of computing ends the process and is not right, as one that crashes it. The limit
    is on computing time, so that the verdict does not depend on how busy the machine is.

    Args:
      processes: at most so many at a time; started with the first answers.

    Attributes:
      late: answers so far that got no verdict and count as not right; equal ones of a batch are one.
    """

    def __init__(self, own: Own, processes: int, seconds: float):
        self._own, self._processes, self._seconds = own, processes, seconds
        self._idle: queue.LifoQueue[HostedSpecialist | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        self.late = 0
        self._counting = threading.Lock()

    def try_out(self) -> None:
        """Starts a process and ends it.

        Raises:
          ConfigError: the function does not import there.
        """
        self._ready(None).end()

    def decide(self, answers: Sequence[tuple[Task, str]]) -> list[float]:
        """The outcome of each, in order; equal ones are decided once.

        Raises:
          ConfigError: the function raised, or gave something else than an outcome.
        """
        if not answers:
            return []
        each = list(dict.fromkeys(answers))
        with concurrent.futures.ThreadPoolExecutor(self._processes) as pool:
            found = dict(zip(each, pool.map(lambda one: self._decide(*one), each), strict=True))
        return [found[answer] for answer in answers]

    def close(self) -> None:
        """Ends the processes; the next answer would start new ones."""
        for hosted in [self._idle.get() for _ in range(self._processes)]:
            if hosted is not None:
                hosted.close()
                hosted.end()
            self._idle.put(None)

    def _ready(self, hosted: HostedSpecialist | None) -> HostedSpecialist:
        try:
            if hosted is not None:
                hosted.restart_if_ended()
                return hosted
            options = {"where": self._own.where, "path": self._own.path, "seconds": self._seconds}
            hosted = HostedSpecialist(self._own.where, "maestro_jax.rewards.own:GraderProcess", options)
            hosted.ready()
            return hosted
        except SpecialistError as error:
            raise ConfigError(
                f"{self._own.where}: its process does not start ({error}); see what it printed"
            ) from error

    def _decide(self, task: Task, answer: str) -> float:
        hosted = self._idle.get()
        try:
            hosted = self._ready(hosted)
            fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task)}  # no subclass's
            del fields["images"]
            told = Message("user", json.dumps({"task": fields, "answer": answer}), task.images)
            timer = threading.Timer(self._seconds + WAIT_SECONDS, hosted.kill)
            timer.start()
            try:
                found = json.loads(hosted.answer([told]))
            except SpecialistError as error:
                self._note_late(task, error)
                return 0.0
            finally:
                timer.cancel()
        finally:
            self._idle.put(hosted)
        if "error" in found:
            raise ConfigError(found["error"])
        return float(found["outcome"])

    def _note_late(self, task: Task, error: SpecialistError) -> None:
        with self._counting:
            self.late += 1
        logger.warning(
            '%s: %s gave no verdict on task "%s" within %g s of computing (%s); the answer counts as not right, as %d '
            "so far",
            *(self._own.where, self._own.path, task.id, self._seconds, error, self.late),
        )


class GraderProcess:
    """What runs in the process: the interface of an expert's class (`registry/experts/implementations.py`)."""

    def __init__(self, where: str, path: str, seconds: float):
        self._own, self._seconds = Own(where, path), seconds
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever has loaded libtpu ignores it, and what he starts too

    def answer(self, messages: Sequence[Message]) -> str:
        try:
            told = json.loads(messages[0].text)
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in told["task"].items()
            }
            task = Task(**fields, images=messages[0].images)
            signal.setitimer(signal.ITIMER_PROF, self._seconds)  # the kernel ends it; no handler has to run
            return json.dumps({"outcome": self._own.number(task, told["answer"], *OUTCOME)})
        except UserError as error:
            return json.dumps({"error": str(error)})
        except BaseException as error:  # a process that lives is not late: SystemExit and the like are errors, too
            told_as = f"{self._own.where}: {self._own.path} gave no outcome ({one_line(error)}); correct it"
            return json.dumps({"error": told_as})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
