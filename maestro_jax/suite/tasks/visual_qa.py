"""The suite's visual questions: the published easy-VQA set, its own images, questions and split.

In come the files of the `easy_vqa` package, out go tasks about one coloured shape on a light
ground. The set's yes/no rows are mostly predictable from their wording alone ("is no red shape
present?" is nearly always yes), so kinds of answers are drawn in fixed shares instead of as found.
"""

import functools
import itertools
import pathlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import easy_vqa

from maestro_jax.errors import ConfigError
from maestro_jax.types import Task

SOURCE = "visual_qa"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("circle", "rectangle", "triangle")

# One round of answer kinds: 3/4 open questions, 1/4 yes or no in equal parts.
_ROUND = ("colour", "kind", "yes", "kind", "colour", "kind", "colour", "no")


class Row(NamedTuple):
    """One question of the published set; `image` is its number within the split."""

    question: str
    answer: str
    image: int


@functools.cache
def rows(split: str) -> tuple[Row, ...]:
    """All questions of easy-VQA's own split, "train" or "test"."""
    if split not in ("train", "test"):
        raise ConfigError(f"suite split {split!r} does not exist: easy-VQA has 'train' and 'test'")
    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    return tuple(Row(*row) for row in zip(*read(), strict=True))


@functools.cache
def image_paths(split: str) -> dict[int, str]:
    """Image number → PNG file of easy-VQA's own split."""
    found: dict[int, str] = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    return found


def answer_kind(answer: str) -> str:
    """What an answer (or a word) names: "colour", "kind", or the word itself."""
    return "colour" if answer in COLOURS else "kind" if answer in KINDS else answer


def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
    """Yields `count` tasks of a split; no row is used twice."""
    pools: dict[str, list[Row]] = {}
    for row in rows(split):
        pools.setdefault(answer_kind(row.answer), []).append(row)
    for name in sorted(pools):
        random.Random(f"{SOURCE}/{split}/{seed}/{name}").shuffle(pools[name])
    limit = min(len(pool) // _ROUND.count(name) * len(_ROUND) for name, pool in pools.items())
    if count > limit:
        raise ConfigError(f"visual_qa/{split} has {limit} balanced tasks, {count} were asked for: lower the count")
    for number, kind in enumerate(itertools.islice(itertools.cycle(_ROUND), count)):
        row = pools[kind].pop()
        image = pathlib.Path(image_paths(split)[row.image]).read_bytes()
        yield Task(f"{SOURCE}/{split}/{number:05d}", row.question, (image,), (row.answer,), SOURCE)
