"""Functions of a user's own, as a config names them: "tests.rewards.mine:NAME"."""

import ast
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from maestro_jax.rewards.maths import maths
from maestro_jax.rewards.reward import EpisodeSummary
from maestro_jax.types import Task


def share_of_letters(task: Task, answer: str) -> float:
    """Partial credit: the share of the gold answer's letters that the answer has at the same place."""
    gold = task.answers[0]
    return sum(said == true for said, true in zip(answer, gold, strict=False)) / len(gold)


def as_numpy(task: Task, answer: str) -> Any:
    return np.bool_(True) if answer == "yes" else np.float32(0.5)


def as_algebra(task: Task, answer: str) -> Any:
    return maths(task, answer)


NUMBERS = {"nan": math.nan, "inf": math.inf, "huge": 10**400, "endless": 10**5000}


def gives(task: Task, answer: str) -> Any:
    """What the answer says in Python."""
    return NUMBERS[answer] if answer in NUMBERS else ast.literal_eval(answer)


def raises(task: Task, given: Any) -> float:
    raise KeyError("what\nnow")


def endless(task: Task, answer: str) -> bool:
    while answer == "loop":
        pass
    if answer == "crash":
        os.abort()
    return answer == task.answers[0]


def leaves(task: Task, answer: str) -> bool:
    raise SystemExit(answer)


def sees_images(task: Task, answer: str) -> float:
    return len(task.images) / 4


def brevity(task: Task, episode: EpisodeSummary) -> float:
    return float(sum(turn.tokens for turn in episode.turns))


def asked_twice(task: Task, episode: EpisodeSummary) -> int:
    experts = [call.expert for call, _ in episode.calls]
    return len(experts) - len(set(experts))


def never(task: Task, episode: EpisodeSummary) -> float:
    return float("nan")


def open_tasks(paths: Sequence[str], split: str, image_root: str) -> list[Any]:
    """A task a path, or "PROBLEM" in place of one."""
    made: list[Any] = []
    for number, path in enumerate(paths or ("a", "b")):
        task = Task(f"{split}/{number}", f"what is {path}?", (), (path,), "mine")
        wrong = {"no task": path, "no id": Task("", "q", (), (), "s"), "list": Task("i", "q", (), ["a"], "s")}  # type: ignore[arg-type]
        made.append(wrong.get(path, task))
    return made


def opens_nothing(paths: Sequence[str], split: str, image_root: str) -> None:
    return None
