"""Shape vision on drawn pictures, and what Shape-Sight answers about them."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists.prompting import UNKNOWN
from maestro_jax.suite.specialists.shapes import ShapeSight, find_regions, is_negated, is_polar, words_asked
from maestro_jax.suite.tasks import drawing


def scene(*objects: tuple[str, str, tuple[int, int, int, int]], side: int = 64) -> Image.Image:
    """A light picture with (colour, kind, box) objects."""
    image = Image.new("RGB", (side, side), (240, 244, 250))
    draw = ImageDraw.Draw(image)
    for colour, kind, (left, top, right, bottom) in objects:
        if kind == "circle":
            draw.ellipse((left, top, right, bottom), fill=colour)
        elif kind == "rectangle":
            draw.rectangle((left, top, right, bottom), fill=colour)
        else:
            draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=colour)
    return image


def ask(question: str, image: Image.Image) -> str:
    message = Message("user", f"Look closely.\nQuestion: {question}\nFocus: ", (drawing.encode(image),))
    return ShapeSight().answer([message])


@pytest.mark.parametrize("kind", ["circle", "rectangle", "triangle"])
def test_find_regions_names_each_kind(kind: str) -> None:
    regions = find_regions(np.asarray(scene(("red", kind, (20, 20, 44, 44)))))
    assert [(region.colour, region.kind) for region in regions] == [("red", kind)]


def test_find_regions_separates_touching_colours() -> None:
    image = scene(("red", "rectangle", (10, 10, 29, 29)), ("blue", "rectangle", (30, 10, 49, 29)))
    assert sorted(region.colour for region in find_regions(np.asarray(image))) == ["blue", "red"]


def test_find_regions_box_is_exclusive_on_the_right_and_below() -> None:
    (region,) = find_regions(np.asarray(scene(("black", "rectangle", (10, 12, 29, 31)))))
    assert (region.left, region.top, region.right, region.bottom) == (10, 12, 30, 32)


def test_find_regions_of_an_empty_picture() -> None:
    assert find_regions(np.asarray(scene())) == []


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what color is the shape?", "blue"),
        ("what shape is in the image?", "circle"),
        ("what is the blue shape?", "circle"),
        ("is there a circle?", "yes"),
        ("is there not a circle?", "no"),
        ("does the image not contain a red shape?", "yes"),
        ("is no blue shape present?", "no"),
        ("how many circles are there?", "1"),
        ("which month is the highest?", UNKNOWN),
    ],
)
def test_shape_sight_answers_about_one_object(question: str, answer: str) -> None:
    assert ask(question, scene(("blue", "circle", (20, 20, 44, 44)))) == answer


def test_shape_sight_does_not_see_far_off_the_middle() -> None:
    assert ask("what color is the shape?", scene(("blue", "circle", (2, 2, 12, 12)))) == UNKNOWN


@pytest.mark.parametrize("images", [(), (b"",), (b"no picture",)])
def test_shape_sight_without_a_readable_image(images: tuple[bytes, ...]) -> None:
    assert ShapeSight().answer([Message("user", "Question: what color is the shape?", images)]) == UNKNOWN


def test_shape_sight_without_any_message() -> None:
    assert ShapeSight().answer([]) == UNKNOWN


def test_words_asked_are_singular() -> None:
    assert words_asked("How many red circles are there?") == ("red", "circle")


def test_polar_questions_are_told_from_open_ones() -> None:
    assert [is_polar(text) for text in ("Is there a circle?", "what shape is it?")] == [True, False]


def test_negation_needs_a_whole_word() -> None:
    assert [is_negated(text) for text in ("is there not a circle?", "is there a note?")] == [True, False]
