import itertools
import re

import pytest

from maestro_jax.suite.specialists.prompting import pixels
from maestro_jax.suite.tasks import charts


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_are_deterministic(split):
    assert list(charts.tasks(split, 6, 3)) == list(charts.tasks(split, 6, 3))


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_are_short_and_of_one_size(split):
    for task in charts.tasks(split, 60, 0):
        assert pixels(task.images[0]).shape == (192, 256, 3)
        assert len(task.answers[0]) <= 12 and len(task.question.split()) <= 20, task.question


def test_seeds_differ():
    assert [t.question for t in charts.tasks("train", 8, 0)] != [t.question for t in charts.tasks("train", 8, 1)]


def test_no_series_is_in_both_splits():
    seen = {
        split: {(series.title, series.values) for group in charts._series(split) for series in group}
        for split in ("train", "test")
    }
    assert not seen["train"] & seen["test"]


def test_every_kind_of_question_is_asked():
    asked = " | ".join(task.question for task in charts.tasks("train", 150, 0))
    for templates in charts._QUESTIONS.values():
        patterns = [re.escape(t).replace(r"\{a\}", r"\S+").replace(r"\{b\}", r"\S+") for t in templates]
        assert any(re.search(pattern, asked) for pattern in patterns), templates


CHART = charts._Chart("bar", "title", ("Ada", "Bob", "Eve"), (4.0, 2.5, 12.25), 15.0)


@pytest.mark.parametrize(
    ("asked", "names", "answer"),
    [
        ("value", ("Bob",), "2.5"),
        ("most", (), "Eve"),
        ("least", (), "Bob"),
        ("difference", ("Eve", "Ada"), "8.25"),
        ("trend", (), "rising"),
        ("count", (), "3"),
    ],
)
def test_gold_answers(asked, names, answer):
    assert charts._answer(asked, CHART, names) == answer


@pytest.mark.parametrize(("value", "text"), [(8.256, "8.26"), (12.25, "12.2"), (35361.4, "35361"), (3.0, "3")])
def test_numbers_are_short(value, text):
    assert charts._number(value) == text


@pytest.mark.parametrize("largest", [0.3, 1.0, 9.9, 72.0, 850.0, 42750.0])
def test_ticks_are_few_and_reach_the_largest_value(largest):
    step = charts._step(largest)
    assert 2 <= largest / step <= 5


def test_extremes_are_not_asked_between_years():
    # relaxed accuracy would take any year for any other
    years = charts._Chart("bar", "title", ("1990", "1991", "1992"), (4.0, 2.5, 12.0), 15.0)
    assert charts._subjects("most", years, None) is None


def test_train_tasks_differ():
    tasks = list(charts.tasks("train", 100, 0))
    same = sum(a.images == b.images for a, b in itertools.combinations(tasks, 2))
    assert same == 0
