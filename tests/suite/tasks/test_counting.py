"""The counting domain: labels of the published set, canvases whose count is what was pasted."""

import random

from maestro_jax.suite.specialists.prompting import pixels
from maestro_jax.suite.tasks import counting, visual_qa


def test_same_seed_gives_the_same_tasks() -> None:
    assert list(counting.tasks("test", 5, seed=3)) == list(counting.tasks("test", 5, seed=3))


def test_labels_agree_with_the_sets_own_answers() -> None:
    labels = counting.labels("test")
    rows = [row for row in visual_qa.rows("test") if row.image in labels and row.answer not in ("yes", "no")]
    assert rows and all(row.answer in labels[row.image] for row in rows)


def test_cutout_is_tight() -> None:
    _, mask = counting.cutout("test", min(counting.labels("test")))
    assert all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def test_compose_reports_only_what_found_room() -> None:
    images = sorted(counting.labels("test"))[:200]
    _, placed = counting.compose("test", images, random.Random(0))
    assert 0 < len(placed) < len(images)


def test_splits_share_no_canvas() -> None:
    train, test = ({task.images for task in counting.tasks(split, 40, seed=0)} for split in ("train", "test"))
    assert not train & test


def test_tasks_are_small_rgb_pictures_with_integer_answers() -> None:
    task = next(counting.tasks("train", 1, seed=0))
    rgb = pixels(task.images[0])
    assert rgb is not None and rgb.shape == (128, 128, 3) and 0 <= int(task.answers[0]) <= counting.MOST
