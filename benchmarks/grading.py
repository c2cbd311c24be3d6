"""Answers graded a second, by plain reading and through the processes that compare expressions.

    python -m benchmarks.grading

Plain reading happens in the trainer and is counted in its computing time; expressions are counted in wall time, when
all processes are warm, and in computing time of one comparison. Every answer has the verdict that it should have.
"""

import resource
import time
from collections.abc import Sequence

from maestro_jax.rewards.graders import BUILT_IN, Answer
from maestro_jax.types import Task

PLAIN, EXPRESSIONS, HOSTILE = 20_000, 400, 8
Case = tuple[Task, str, bool]


def task(source: str, *answers: str, choices: tuple[str, ...] = ()) -> Task:
    return Task("", "", (), answers, source, choices)


def plain_cases() -> dict[str, list[Case]]:
    """Source → answers that plain reading decides, right and wrong ones in turn."""
    animals = task("HRBench-4K", "B", choices=("cat", "dog", "bird", "fish"))
    choices = [(animals, answer, right) for answer, right in (("(B) dog", True), ("A or B", False), ("dog", True))]
    organs = task("SLAKE", "Lung, Heart")
    lists = [(organs, answer, right) for answer, right in (("heart and lung", True), ("Lung", False), ("No", False))]
    return {
        "ChartQA": [(task("ChartQA", str(100 * n)), f"The answer is {103 * n}.", True) for n in range(PLAIN)],
        "HRBench-4K": [choices[n % 3] for n in range(PLAIN)],
        "SLAKE": [lists[n % 3] for n in range(PLAIN)],
        "OCRBench": [(task("OCRBench", f"{n} Av"), f"It says {n} AVENUE.", True) for n in range(PLAIN)],
        "MathVision, numbers": [(task("MathVision", str(n)), f"${n + n % 2}$ cm", n % 2 == 0) for n in range(PLAIN)],
    }


def expression_cases(start: int, count: int) -> list[Case]:
    golds = [(task("MathVision", rf"{n}\sqrt{{3}}"), n) for n in range(start, start + count)]
    return [(gold, rf"\sqrt{{{3 * n * n + n * (n % 2)}}}", n % 2 == 0) for gold, n in golds]


def hostile_cases(count: int) -> list[Case]:
    return [(task("MathVision", r"2\sqrt{3}"), f"{10**6 + n}!", False) for n in range(count)]


def graded(cases: Sequence[Case]) -> None:
    found = BUILT_IN.outcomes([Answer(case_task, answer) for case_task, answer, _ in cases])
    assert found == [right for *_, right in cases]


def main() -> None:
    for name, cases in plain_cases().items():
        began = time.process_time()
        graded(cases)
        print(f"{name}: {len(cases) / (time.process_time() - began):,.0f} answers a second of computing")
    graded(expression_cases(1000, 8))  # starts the processes
    for name, cases in {"expressions": expression_cases(2, EXPRESSIONS), "hostile": hostile_cases(HOSTILE)}.items():
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        graded(cases)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        mine = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{name}: {len(cases) / seconds:,.1f} answers a second through the processes; "
            f"{1000 * mine / len(cases):.2f} ms of the trainer's computing an answer"
        )


if __name__ == "__main__":
    main()
