"""The suite's geometry questions: labelled figures whose numbers must be read from the pixels.

In come problems: missing polygon angles and chains of sums from reasoning_gym (its own answers),
and rectangles and right triangles computed here. Out go tasks with a rendered figure. The question
never holds a number, and figures are sketches, not to scale, so nothing can be measured.
Train and held-out are disjoint by content: a hash of the problem's numbers decides the split.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import reasoning_gym
from PIL import Image, ImageDraw

from maestro_jax.errors import ConfigError
from maestro_jax.suite.tasks import drawing
from maestro_jax.types import Task

SOURCE = "geometry"
SIDE = 192
_HELD_OUT = 4  # one problem in this many is held out

_POLYGONS = {3: "triangle", 4: "quadrilateral", 5: "pentagon"}
_LEGS = ((3, 4), (5, 12), (8, 15), (7, 24), (20, 21), (9, 40), (12, 35), (28, 45))  # of primitive right triangles
_FILLS = ((232, 240, 254), (254, 243, 224), (232, 245, 233), (252, 228, 236), (237, 231, 246))
_INKS = ((25, 60, 140), (150, 50, 20), (30, 100, 50), (110, 30, 110))


class Problem(NamedTuple):
    """One exact problem: the figure to draw, its labels in the figure's order, what is asked, the answer."""

    figure: str  # "polygon" | "rectangle" | "right triangle" | "board"
    labels: tuple[str, ...]
    question: str
    answer: str
    content: str  # the numbers behind it, whichever of them is asked for: what splits must not share


def split_of(problem: Problem) -> str:
    """Which split a problem belongs to, whatever the seed."""
    digest = hashlib.sha256(f"{problem.figure} {problem.content}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % _HELD_OUT == 0 else "train"


# ---- problems


def _angles(rng: random.Random) -> Problem:
    while True:
        source = reasoning_gym.create_dataset(
            "simple_geometry", min_sides=3, max_sides=5, min_angle=20, size=1, seed=rng.getrandbits(30)
        )[0]
        if 10 <= int(source["answer"]) <= 175:  # its "convex" polygons may ask for a reflex angle
            break
    known = [f"{round(angle)}°" for angle in source["metadata"]["known_angles"]]
    question = rng.choice(
        (
            "What is the missing angle of the {}, in degrees?",
            "How many degrees is the angle marked ? in this {}?",
            "Find the unknown interior angle of the {}.",
        )
    )
    name = _POLYGONS[len(known) + 1]
    return Problem("polygon", (*known, "?"), question.format(name), source["answer"], str(sorted(known)))


def _rectangle(rng: random.Random) -> Problem:
    width, height, unit = rng.randint(3, 48), rng.randint(3, 48), rng.choice(("cm", "m"))
    perimeter = ("What is the perimeter of the rectangle?", "How long is the way round the rectangle?")
    area = ("What is the area of the rectangle?", "How large is the rectangle's area?")
    asked, answer = rng.choice(((perimeter, 2 * (width + height)), (area, width * height)))
    labels = (f"{width} {unit}", f"{height} {unit}")
    return Problem("rectangle", labels, rng.choice(asked), str(answer), str(sorted((width, height))))


def _right_triangle(rng: random.Random) -> Problem:
    sides = list(rng.choice(_LEGS))
    rng.shuffle(sides)
    scale = rng.randint(1, max(1, 90 // max(sides)))
    sides = [side * scale for side in (*sides, math.isqrt(sides[0] ** 2 + sides[1] ** 2))]
    unknown = rng.randrange(3)
    hypotenuse = ("How long is the hypotenuse of the right triangle?", "Find the hypotenuse marked ?.")
    leg = ("How long is the missing leg of the right triangle?", "Find the leg marked ? of the right triangle.")
    labels = tuple("?" if place == unknown else str(side) for place, side in enumerate(sides))
    question = rng.choice(hypotenuse if unknown == 2 else leg)
    return Problem("right triangle", labels, question, str(sides[unknown]), str(sorted(sides)))


def _board(rng: random.Random) -> Problem:
    while True:
        source = reasoning_gym.create_dataset(
            "chain_sum", min_terms=2, max_terms=3, min_digits=2, max_digits=2, size=1, seed=rng.getrandbits(30)
        )[0]
        if int(source["answer"]) >= 0:
            break
    question = rng.choice(
        ("What is the result of the sum on the board?", "Work out the expression shown.", "Which number replaces the ?")
    )
    expression = source["metadata"]["expression"]
    return Problem("board", (f"{expression} = ?",), question, source["answer"], expression)


# ---- figures


def _label(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str) -> None:
    drawing.centered(draw, at, text, 14)


def _draw_polygon(draw: ImageDraw.ImageDraw, labels: tuple[str, ...], rng: random.Random) -> None:
    corners, start = len(labels), rng.uniform(0, 2 * math.pi)
    turns = [start + 2 * math.pi * (corner + rng.uniform(-0.08, 0.08)) / corners for corner in range(corners)]
    middle, radius = SIDE / 2, 86
    points = [(middle + radius * math.cos(turn), middle + radius * math.sin(turn)) for turn in turns]
    _outline(draw, points, rng)
    inner = 42 if corners == 3 else 54  # narrow corners leave room for a label only further in
    for turn, label in zip(turns, labels, strict=True):
        _label(draw, (middle + inner * math.cos(turn), middle + inner * math.sin(turn)), label)


def _draw_rectangle(draw: ImageDraw.ImageDraw, labels: tuple[str, ...], rng: random.Random) -> None:
    width, height = rng.randint(60, 110), rng.randint(50, 120)
    left, top = rng.randint(10, 130 - width), rng.randint(10, 150 - height)
    _outline(draw, [(left, top), (left + width, top), (left + width, top + height), (left, top + height)], rng)
    _label(draw, (left + width / 2, top + height + 14), labels[0])
    _label(draw, (left + width + 30, top + height / 2), labels[1])


def _draw_right_triangle(draw: ImageDraw.ImageDraw, labels: tuple[str, ...], rng: random.Random) -> None:
    """Labels: horizontal leg, vertical leg, hypotenuse; the right angle is at the bottom left."""
    width, height = rng.randint(80, 110), rng.randint(80, 120)
    left, bottom = rng.randint(40, 60), rng.randint(height + 10, 160)
    _outline(draw, [(left, bottom), (left + width, bottom), (left, bottom - height)], rng)
    draw.rectangle((left, bottom - 9, left + 9, bottom), outline="black")
    _label(draw, (left + width / 2, bottom + 14), labels[0])
    _label(draw, (left - 18, bottom - height / 2), labels[1])
    _label(draw, (left + width / 2 + 18, bottom - height / 2 - 14), labels[2])


def _draw_board(draw: ImageDraw.ImageDraw, labels: tuple[str, ...], rng: random.Random) -> None:
    top = rng.randint(20, 90)
    _outline(draw, [(8, top), (SIDE - 8, top), (SIDE - 8, top + 60), (8, top + 60)], rng)
    drawing.centered(draw, (SIDE / 2, top + 30), labels[0], 18)


def _outline(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], rng: random.Random) -> None:
    draw.polygon(points, fill=rng.choice(_FILLS), outline=rng.choice(_INKS), width=2)


_FIGURES: dict[str, Callable[[ImageDraw.ImageDraw, tuple[str, ...], random.Random], None]] = {
    "polygon": _draw_polygon,
    "rectangle": _draw_rectangle,
    "right triangle": _draw_right_triangle,
    "board": _draw_board,
}
_PROBLEMS = (_angles, _rectangle, _right_triangle, _board)


def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
    """Yields `count` tasks of a split, the kinds of problems in turn."""
    if split not in ("train", "test"):
        raise ConfigError(f"suite split {split!r} does not exist: geometry has 'train' and 'test'")
    for number in range(count):
        rng = random.Random(f"{SOURCE}/{split}/{seed}/{number}")
        problem = _PROBLEMS[number % len(_PROBLEMS)](rng)
        while split_of(problem) != split:
            problem = _PROBLEMS[number % len(_PROBLEMS)](rng)
        image = Image.new("RGB", (SIDE, SIDE), "white")
        _FIGURES[problem.figure](ImageDraw.Draw(image), problem.labels, rng)
        content = (drawing.encode(image),)
        yield Task(f"{SOURCE}/{split}/{number:05d}", problem.question, content, (problem.answer,), SOURCE)
