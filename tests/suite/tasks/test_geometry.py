"""The geometry domain: exact answers, disjoint splits, nothing to solve without the picture."""

import random
import re

import pytest
import reasoning_gym

from maestro_jax.errors import ConfigError
from maestro_jax.suite.specialists.prompting import pixels
from maestro_jax.suite.tasks import geometry


def problems(number: int) -> list[geometry.Problem]:
    rng = random.Random(0)
    return [make(rng) for _ in range(number) for make in geometry._PROBLEMS]


def test_same_seed_gives_the_same_tasks() -> None:
    assert list(geometry.tasks("test", 8, seed=3)) == list(geometry.tasks("test", 8, seed=3))


def test_split_goes_by_the_numbers_and_not_by_what_is_asked() -> None:
    first = geometry.Problem("right triangle", ("3", "4", "?"), "How long is the hypotenuse?", "5", "[3, 4, 5]")
    other = geometry.Problem("right triangle", ("4", "?", "5"), "Find the leg.", "3", "[3, 4, 5]")
    assert geometry.split_of(first) == geometry.split_of(other)


def test_splits_share_no_picture() -> None:
    train, test = ({task.images for task in geometry.tasks(split, 60, seed=0)} for split in ("train", "test"))
    assert not train & test


def test_polygon_angles_add_up() -> None:
    found = [problem for problem in problems(20) if problem.figure == "polygon"]
    sums = [(len(p.labels), int(p.answer) + sum(int(label[:-1]) for label in p.labels[:-1])) for p in found]
    assert all(total == 180 * (corners - 2) for corners, total in sums)


def test_right_triangles_are_right() -> None:
    found = [problem for problem in problems(20) if problem.figure == "right triangle"]
    sides = [[int(side.replace("?", p.answer)) for side in p.labels] for p in found]
    assert all(a * a + b * b == c * c for a, b, c in sides)


def test_boards_pass_the_generators_own_verifier() -> None:
    board = next(problem for problem in problems(1) if problem.figure == "board")
    verifier = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    entry = {
        "answer": str(sum(int(term) for term in re.findall(r"[+-]?\d+", board.content.replace(" ", "")))),
        "metadata": {"source_dataset": "chain_sum"},
    }
    assert verifier.score_answer(board.answer, entry) == 1.0


def test_questions_hold_no_number() -> None:
    assert not any(character.isdigit() for problem in problems(30) for character in problem.question)


def test_pictures_have_sides_in_multiples_of_32() -> None:
    rgb = pixels(next(geometry.tasks("train", 1, seed=0)).images[0])
    assert rgb is not None and rgb.shape == (192, 192, 3)


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match="'validation'"):
        next(geometry.tasks("validation", 1, seed=0))
