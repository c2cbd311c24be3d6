"""Is an answer right? The table of graders, one for each source of tasks (docs/grading.md).

In: tasks with their gold answers, and the policy's answers. Out: the outcome of each, from 0 (wrong) to 1 (right).
Plain reading decides most in microseconds; expressions and programs are decided in processes of their own, those of a
batch side by side, and a judge is asked. Answers are untrusted: their length is capped, and what they can use up is,
too.

A run adds graders of its own (`config.graders`), or puts them in the place of built-in ones.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.names import nearest, normalise_name, quote
from maestro_jax.registry.description.stages import placeholders
from maestro_jax.rewards import equations
from maestro_jax.rewards.choices import multiple_choice
from maestro_jax.rewards.counts import blind, counted
from maestro_jax.rewards.equations import Equations
from maestro_jax.rewards.judges import INPUTS, MOST_POINTS, Judge, Judgement
from maestro_jax.rewards.maths import Equation, maths
from maestro_jax.rewards.medical import medical
from maestro_jax.rewards.numbers import exact_integer, exact_number, relaxed_accuracy, worded_text
from maestro_jax.rewards.ocrbench import ocrbench
from maestro_jax.rewards.own import OUTCOME, HostedGrader, Own
from maestro_jax.rewards.programs import Programs, TestRun, passes_tests
from maestro_jax.types import Task

MAX_ANSWER_CHARS = 4096
MAX_PROGRAM_CHARS = 32_768  # and of what the user's own graders are given
OTHERS = "*"  # the grader of sources that have none of their own

# All but numbers are still to be decided: by algebra, by tests, by a judge.
Verdict = float | Equation | TestRun | Judgement
Grader = Callable[[Task, str], Verdict]


def any_gold(equal: Callable[[str, str], bool]) -> Grader:
    """The grader that compares the answer with each gold answer."""
    return lambda task, answer: any(equal(answer, gold) for gold in task.answers)


GRADERS: dict[str, Grader] = {
    # the offline suite
    "visual_qa": any_gold(worded_text),
    "reading": any_gold(worded_text),
    "counting": any_gold(exact_integer),
    "charts": any_gold(relaxed_accuracy),
    "geometry": any_gold(exact_number),
    # the paper's benchmarks
    "ChartQA": any_gold(relaxed_accuracy),
    "Geometry3K": maths,
    "MicroVQA": multiple_choice,
    "MSEarthMCQ": multiple_choice,
    "SLAKE": medical,
    "TallyQA": any_gold(counted),
    "HRBench-4K": multiple_choice,
    "HRBench-8K": multiple_choice,
    "VStar": multiple_choice,
    "MathVision": maths,
    # out of domain
    "ERQA": multiple_choice,
    "OCRBench": ocrbench,
    "VLMsAreBlind": any_gold(blind),
    "HumanEval-V": passes_tests,
}

_equations, _programs = Equations(), Programs("auto")


class Answer(NamedTuple):
    """An answer to be graded; `asker` tells its judge's calls from all others, the same in every run."""

    task: Task
    text: str
    asker: str = ""


class Judges(Protocol):
    """Asks the judges of a run. All of its processes call both side by side."""

    def __call__(self, asked: Sequence[tuple[str, Judgement]], episodes: int) -> Sequence[float]:
        """Who asks, and what → outcomes in their order, NaN where there is no verdict.

        Args:
          episodes: of which these are to be judged.
        """
        ...

    def check(self, unjudged: Sequence[str]) -> None:
        """Raises UserError if too many are without a verdict: of each episode, who gave none, or an empty text."""
        ...


class Graders:
    """The graders of a run, by name: a task's `grader`, else its `source`.

    Args:
      own: `config.graders`: name → name of a built-in grader, "package.module:name", or a mapping (docs/grading.md).
      registry: that judges are experts of.

    Raises:
      ConfigError: an entry is wrong.
    """

    def __init__(self, own: Mapping[str, Any] | None = None, registry: RegistryConfig | None = None):
        made: dict[str, Grader | HostedGrader] = {}
        for name, value in (own or {}).items():
            if not isinstance(name, str):
                raise ConfigError(f"config.graders has the key {name!r:.60}; keys are names of sources, so quote it")
            if plain_name(name) in map(plain_name, made):
                raise ConfigError(
                    f'config.graders has "{name}" twice (case, "-", "_", "." and " " do not count); rename one'
                )
            made[name] = _read_grader(f"config.graders.{name}", value, registry)
        self._others = made.pop(OTHERS, None)
        self._names = [*made, *(name for name in GRADERS if name not in made)]
        self._by_name = {plain_name(name): grader for name, grader in {**GRADERS, **made}.items()}
        self._all = [*made.values(), *filter(None, [self._others])]

    @property
    def has_judges(self) -> bool:
        return any(isinstance(grader, Judge) for grader in self._all)

    def find(self, source: str, grader: str = "") -> Grader | HostedGrader:
        """The grader of a name, or of a source, by `plain_name`: "hrbench_4k" is "HRBench-4K".

        Raises:
          ConfigError: there is none.
        """
        found = self._by_name.get(plain_name(grader or source)) or (None if grader else self._others)
        if found is None:
            known = ", ".join(self._names)
            missing = f"no grader is called {quote(grader)}" if grader else f"no grader for source {quote(source)}"
            raise ConfigError(f"{missing}; known: {known}; name one in config.graders")
        return found

    def open(self, names: Iterable[tuple[str, str]]) -> None:
        """That tasks of these sources and graders can be graded here; for the start, before anything is computed.

        Raises:
          ConfigError: there is no grader, or it needs what is not installed or does not start.
        """
        graders = [self.find(*pair) for pair in sorted(set(names))]
        if maths in graders:
            equations.check_installed()
        if passes_tests in graders:
            _programs.open()
        for grader in graders:
            if isinstance(grader, HostedGrader):
                grader.try_out()

    def close(self) -> None:
        """Ends the processes of the run's own graders."""
        for grader in self._all:
            if isinstance(grader, HostedGrader):
                grader.close()

    def judge_of(self, task: Task) -> str:
        """The expert that judges answers to `task`; empty if none does."""
        found = self.find(task.source, task.grader)
        return found.expert if isinstance(found, Judge) else ""

    def looks_at_images(self, task: Task) -> bool:
        """Whether the task's images may count for its verdict; they do not for built-in graders."""
        found = self.find(task.source, task.grader)
        return isinstance(found, Own | HostedGrader) or (isinstance(found, Judge) and found.images)

    def grade(self, task: Task, answer: str) -> float:
        """`outcomes` of one answer that no judge grades."""
        return self.outcomes([Answer(task, answer)])[0]

    def outcomes(self, answers: Sequence[Answer], judges: Judges | None = None, episodes: int = 0) -> list[float]:
        """How right each answer is, 0 to 1; NaN where its judge gave no verdict.

        What plain reading leaves open is decided side by side.

        Args:
          judges: called once where the run has any, be it with nothing to ask: all processes do.
          episodes: that the answers are of; at least as many.

        Raises:
          ConfigError: no grader is known, what it needs is not installed, or one of the user's fails.
        """
        graders = [self._grader(answer) for answer in answers]
        verdicts = [
            0.0 if grader is None or isinstance(grader, HostedGrader) else grader(answer.task, answer.text)
            for grader, answer in zip(graders, answers, strict=True)
        ]

        def decided(numbers: Sequence[int], outcomes: Sequence[float]) -> None:
            for number, outcome in zip(numbers, outcomes, strict=True):
                verdicts[number] = outcome

        for hosted in {id(one): one for one in graders if isinstance(one, HostedGrader)}.values():
            own = [number for number, grader in enumerate(graders) if grader is hosted]
            decided(own, hosted.decide([answers[number][:2] for number in own]))
        asked = {number: verdict for number, verdict in enumerate(verdicts) if isinstance(verdict, Judgement)}
        if self.has_judges and judges is not None:
            questions = [(answers[number].asker, verdict) for number, verdict in asked.items()]
            decided(list(asked), judges(questions, max(episodes, len(answers))))
        elif asked:
            raise ConfigError("an answer is graded by a judge, and nobody can be asked here; open the run's registry")
        equal, passed = of_kind(verdicts, Equation), of_kind(verdicts, TestRun)
        solved: dict[Any, bool] = dict(zip(equal, _equations.decide(equal), strict=True))
        solved |= zip(passed, _programs.decide(passed), strict=True)
        outcomes: list[Any] = [solved[one] if isinstance(one, Equation | TestRun) else one for one in verdicts]
        return [
            grader.checked(answer.task, outcome, *OUTCOME) if isinstance(grader, Own) else float(outcome)
            for grader, answer, outcome in zip(graders, answers, outcomes, strict=True)
        ]

    def _grader(self, answer: Answer) -> Grader | HostedGrader | None:
        """Who grades an answer; None if it is none, or too long, and so is wrong."""
        grader = self.find(answer.task.source, answer.task.grader)
        is_long = grader is passes_tests or isinstance(grader, Own | HostedGrader)
        longest = MAX_PROGRAM_CHARS if is_long else MAX_ANSWER_CHARS
        return grader if len(answer.text) <= longest and answer.text.strip() else None


def of_kind(verdicts: Iterable[Verdict], kind: type) -> list:
    """The verdicts that are still open and of one kind, each once."""
    return list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, kind)))


def plain_name(source: str) -> str:
    """A source's name as far as it counts: without case, "-", "_", "." and spaces."""
    return re.sub(r"[-_ .]", "", source.casefold())


# ---- config.graders ----------------------------------------------------------------------------------------


def _read_grader(where: str, value: Any, registry: RegistryConfig | None) -> Grader | HostedGrader:
    if isinstance(value, str):
        return _named(where, value)
    if not isinstance(value, Mapping) or ("judge" in value) == ("grader" in value):
        raise ConfigError(
            f'{where} must be the name of a built-in grader, "package.module:name", or a mapping with "judge" or '
            f'"grader", found {value!r:.60}'
        )
    if "judge" in value:
        return _read_judge(where, value, registry)
    _check_keys(where, value, ("grader", "processes", "seconds"))
    processes, seconds = value.get("processes", min(4, os.cpu_count() or 1)), value.get("seconds", 2.0)
    own = _named(f"{where}.grader", value["grader"])
    if not isinstance(own, Own):
        raise ConfigError(f"{where}.grader {value['grader']!r} is built in and needs no processes; name it alone")
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ConfigError(f"{where}.processes must be an integer of at least 1, found {processes!r:.60}")
    if not _is_number(seconds) or not 0 < seconds <= 3600:
        raise ConfigError(f"{where}.seconds must be a number above 0, up to 3600, found {seconds!r:.60}")
    return HostedGrader(dataclasses.replace(own, where=where), processes, float(seconds))


def _named(where: str, name: Any) -> Grader:
    if isinstance(name, str) and ":" in name:
        return Own(where, name)
    built_in = {plain_name(known): grader for known, grader in GRADERS.items()}
    if not isinstance(name, str) or plain_name(name) not in built_in:
        raise ConfigError(
            f'{where} {name!r:.60} is neither a built-in grader nor "package.module:name"; {nearest(name, GRADERS)}'
        )
    return built_in[plain_name(name)]


def _read_judge(where: str, value: Mapping[str, Any], registry: RegistryConfig | None) -> Judge:
    settings = {"expert" if key == "judge" else key: one for key, one in value.items()}
    fields = {field.name: field for field in dataclasses.fields(Judge)}
    _check_keys(where, value, ("judge", *list(fields)[1:]))
    for key, one in settings.items():
        kind: Any = fields[key].type
        is_right = _is_number(one) if kind is float else isinstance(one, kind)
        if not is_right or (isinstance(one, bool) and kind is not bool):
            raise ConfigError(f"{where}.{key} must be {kind.__name__}, found {one!r:.60}")
    judge = Judge(**settings)
    experts = {} if registry is None else registry.experts_by_name
    expert = experts.get(normalise_name(judge.expert))
    if expert is None:
        raise ConfigError(
            f'{where}.judge "{judge.expert}" is no expert of the registry; '
            f"{nearest(judge.expert, [one.name for one in experts.values()])}"
        )
    if expert.shown:
        raise ConfigError(
            f'{where}.judge "{expert.name}" can be called by the policy, which would ask the judge of its own answers; '
            'set "shown": False in its entry of the registry'
        )
    if "answer" not in placeholders(judge.prompt):
        raise ConfigError(f"{where}.prompt does not show what is to be graded; put {{answer}} into it")
    for name in placeholders(judge.prompt):
        if name not in INPUTS:
            raise ConfigError(f"{where}.prompt has {{{name}}}; {nearest(name, INPUTS)}")
    if not 0 <= judge.points <= MOST_POINTS:
        raise ConfigError(f"{where}.points={judge.points} must be 0 (yes or no) to {MOST_POINTS}")
    if not 0 < judge.deadline < float("inf"):
        raise ConfigError(f"{where}.deadline={judge.deadline} must be a number of seconds above 0")
    return dataclasses.replace(judge, expert=expert.name, deadline=float(judge.deadline))


def _check_keys(where: str, value: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f'{where} has an unknown key "{key}"; {nearest(key, known)}')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


BUILT_IN = Graders()
