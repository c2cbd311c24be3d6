"""Tally counts listed objects when it has a list, and blobs when it has pixels only."""

import pytest
from PIL import Image, ImageDraw

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists.prompting import UNKNOWN
from maestro_jax.suite.specialists.tally import Tally
from maestro_jax.suite.tasks import drawing

_OBJECTS = "Objects:\nred circle @ 1,1,9,9\nred triangle @ 20,1,29,9\nblue circle @ 40,1,49,9\n"


def ask(text: str, images: tuple[bytes, ...] = ()) -> str:
    return Tally().answer([Message("user", text, images)])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("how many shapes are there?", "3"),
        ("count the red shapes.", "2"),
        ("what is the number of circles in the image?", "2"),
        ("how many red circles can you see?", "1"),
        ("how many yellow shapes are there?", "0"),
        ("is there a triangle?", "yes"),
        ("is there a green shape?", "no"),
        ("is there not a circle?", UNKNOWN),
        ("what color is the circle?", UNKNOWN),
    ],
)
def test_counts_the_listed_objects(question: str, answer: str) -> None:
    assert ask(f"Recount.\n{_OBJECTS}Question: {question}\nFocus: count") == answer


def test_an_empty_list_is_zero_and_not_a_missing_list() -> None:
    assert ask("Objects:\nQuestion: how many circles are there?") == "0"


def test_without_a_list_it_counts_blobs() -> None:
    image = Image.new("RGB", (128, 128), (245, 245, 245))
    draw = ImageDraw.Draw(image)
    for left in (10, 50, 90):
        draw.rectangle((left, 40, left + 25, 65), fill="red")
    assert ask("Question: how many red rectangles are there?", (drawing.encode(image),)) == "3"


def test_without_a_list_and_without_an_image() -> None:
    assert ask("Question: how many circles are there?") == UNKNOWN


def test_focus_stands_in_for_a_missing_question() -> None:
    assert ask(f"{_OBJECTS}Focus: how many circles") == "2"
