"""Is an answer right? The table of graders, one for each source of tasks (docs/grading.md).

In: tasks with their gold answers, and the policy's answers. Out: True or False for each. Plain reading decides most in
microseconds; expressions and programs are decided in processes of their own, those of a batch side by side. Answers are
untrusted: their length is capped, and what they can use up is, too.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from maestro_jax.errors import ConfigError
from maestro_jax.rewards import equations
from maestro_jax.rewards.choices import multiple_choice
from maestro_jax.rewards.counts import blind, counted
from maestro_jax.rewards.equations import Equations
from maestro_jax.rewards.maths import Equation, maths
from maestro_jax.rewards.medical import medical
from maestro_jax.rewards.numbers import exact_integer, exact_number, relaxed_accuracy, worded_text
from maestro_jax.rewards.ocrbench import ocrbench
from maestro_jax.rewards.programs import Programs, TestRun, passes_tests
from maestro_jax.types import Task

MAX_ANSWER_CHARS = 4096
MAX_PROGRAM_CHARS = 32_768

Verdict = bool | Equation | TestRun  # the last two: plain reading has none, ask algebra, or the tests
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


def grade(task: Task, answer: str) -> bool:
    """Whether `answer` is right by the rules of the task's source.

    Raises:
      ConfigError: no grader is known for the source, or what it needs is not installed.
    """
    return grade_all([(task, answer)])[0]


def grade_all(pairs: Sequence[tuple[Task, str]]) -> list[bool]:
    """`grade` for many answers: what needs algebra or tests is decided side by side."""
    verdicts = [_read(task, answer) for task, answer in pairs]
    solved = dict(zip(of_kind(verdicts, Equation), _equations.decide(of_kind(verdicts, Equation)), strict=True))
    passed = dict(zip(of_kind(verdicts, TestRun), _programs.decide(of_kind(verdicts, TestRun)), strict=True))
    decided: dict[Verdict, bool] = {True: True, False: False, **solved, **passed}
    return [decided[verdict] for verdict in verdicts]


def of_kind(verdicts: Iterable[Verdict], kind: type) -> list:
    """The verdicts that are still open and of one kind, each once."""
    return list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, kind)))


def grader_for(source: str) -> Grader:
    """The grader of a source; case, "-" and "_" do not count, so that "hrbench_4k" is "HRBench-4K".

    Raises:
      ConfigError: there is none.
    """
    try:
        return _BY_NAME[plain_name(source)]
    except KeyError:
        known = ", ".join(GRADERS)
        raise ConfigError(f'no grader for source "{source}"; known: {known}; add one to GRADERS') from None


def check_sources(sources: Iterable[str]) -> None:
    """That tasks of these sources can be graded here; for the start of a run, before anything is computed.

    Raises:
      ConfigError: a source has no grader, or its grader needs what is not installed.
    """
    graders = [grader_for(source) for source in sorted(set(sources))]
    if maths in graders:
        equations.check_installed()
    if passes_tests in graders:
        _programs.open()


def _read(task: Task, answer: str) -> Verdict:
    grader = grader_for(task.source)
    longest = MAX_PROGRAM_CHARS if grader is passes_tests else MAX_ANSWER_CHARS
    if len(answer) > longest or not answer.strip():
        return False
    return grader(task, answer)


def plain_name(source: str) -> str:
    """A source's name as far as it counts."""
    return re.sub(r"[-_ ]", "", source.casefold())


_BY_NAME = {plain_name(source): grader for source, grader in GRADERS.items()}
