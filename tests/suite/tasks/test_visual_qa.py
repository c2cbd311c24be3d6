"""The easy-VQA domain: balanced, deterministic, and split as published."""

import collections

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.suite.tasks import visual_qa


def test_same_seed_gives_the_same_tasks() -> None:
    assert list(visual_qa.tasks("test", 20, seed=3)) == list(visual_qa.tasks("test", 20, seed=3))


def test_seeds_differ() -> None:
    assert list(visual_qa.tasks("test", 20, seed=3)) != list(visual_qa.tasks("test", 20, seed=4))


def test_no_question_and_image_twice() -> None:
    tasks = list(visual_qa.tasks("train", 400, seed=0))
    assert len({(task.question, task.images) for task in tasks}) == 400


def test_splits_share_no_image() -> None:
    train, test = ({task.images for task in visual_qa.tasks(split, 400, seed=0)} for split in ("train", "test"))
    assert not train & test


def test_yes_and_no_are_equally_frequent() -> None:
    counts = collections.Counter(task.answers[0] for task in visual_qa.tasks("train", 400, seed=0))
    assert counts["yes"] == counts["no"] == 50


def test_too_many_tasks_is_one_line_with_the_cure() -> None:
    with pytest.raises(ConfigError, match="lower the count"):
        next(visual_qa.tasks("test", 100_000, seed=0))


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match="'validation'"):
        next(visual_qa.tasks("validation", 1, seed=0))
