import numpy as np
import pytest

from maestro_jax.suite.specialists.prompting import pixels
from maestro_jax.suite.tasks import reading


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_are_deterministic(split):
    assert list(reading.tasks(split, 6, 3)) == list(reading.tasks(split, 6, 3))


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_are_short_and_fit_the_patch_grid(split):
    for task in reading.tasks(split, 60, 0):
        height, width, _ = pixels(task.images[0]).shape
        assert width == 256 and height % 32 == 0
        assert len(task.answers[0]) <= 12 and len(task.question.split()) <= 20, task.question


def test_seeds_differ():
    assert [t.answers for t in reading.tasks("train", 6, 0)] != [t.answers for t in reading.tasks("train", 6, 1)]


def test_words_and_goods_are_in_one_split():
    train, test = ({city for city, _ in reading._cities(split)} for split in ("train", "test"))
    assert train and test and not train & test
    assert not set(reading._GOODS["train"]) & set(reading._GOODS["test"])


def test_forms_are_in_one_split():
    train, test = ({form for group in reading._forms(split) for form in group} for split in ("train", "test"))
    assert train and test and not train & test


def test_receipts_add_up(monkeypatch):
    written = []
    monkeypatch.setattr(reading, "_rows", lambda title, lines, *rest, **kwargs: written.append(lines))
    for seed in range(20):
        reading._receipt("train", np.random.default_rng(seed))
    for *goods, total in written:
        assert sum(round(100 * float(price)) for _, price in goods) == round(100 * float(total[1]))


def test_gold_is_one_of_the_written_texts(monkeypatch):
    written = []
    monkeypatch.setattr(reading, "_rows", lambda title, lines, *rest, **kwargs: written.append(lines))
    for seed in range(20):
        for make in (reading._receipt, reading._form):
            _, question, answer = make("test", np.random.default_rng(seed))
            named = [value for key, value in written[-1] if key.lower() in question.lower()]
            assert answer in named
