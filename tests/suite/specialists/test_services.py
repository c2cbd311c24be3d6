"""Detection, captioning and zoom on drawn pictures."""

import pytest
from PIL import Image, ImageDraw

from maestro_jax.suite.specialists.prompting import pixels
from maestro_jax.suite.specialists.services import CaptionService, DetectService, ZoomService
from maestro_jax.suite.tasks import drawing


def square(left: int, top: int, width: int = 96, height: int = 64) -> bytes:
    """A picture with one red 16-pixel square."""
    image = Image.new("RGB", (width, height), (240, 240, 240))
    ImageDraw.Draw(image).rectangle((left, top, left + 15, top + 15), fill="red")
    return drawing.encode(image)


def test_detect_lists_objects_with_boxes() -> None:
    assert DetectService().run((square(10, 20),), "")[0] == "red rectangle @ 10,20,26,36"


def test_detect_draws_the_boxes() -> None:
    _, (drawn,) = DetectService().run((square(10, 20),), "")
    rgb = pixels(drawn)
    assert rgb is not None
    assert rgb[20, 10].tolist() == [255, 0, 255]


def test_caption_states_ground_number_and_colour() -> None:
    assert CaptionService().run((square(10, 20),), "")[0] == "A light picture with 1 patch, mostly red."


@pytest.mark.parametrize(("left", "top"), [(40, 24), (0, 0), (80, 48)])
def test_zoom_puts_the_object_in_the_middle(left: int, top: int) -> None:
    _, (crop,) = ZoomService().run((square(left, top),), "")
    rgb = pixels(crop)
    assert rgb is not None
    height, width = rgb.shape[:2]
    assert rgb[height // 2, width // 2].tolist() == [255, 0, 0]


def test_zoom_enlarges_to_the_longer_side() -> None:
    rgb = pixels(ZoomService().run((square(40, 24),), "")[1][0])
    assert rgb is not None
    assert max(rgb.shape) == 96


def test_zoom_leaves_an_empty_picture_alone() -> None:
    blank = drawing.encode(Image.new("RGB", (32, 32), "white"))
    assert ZoomService().run((blank,), "")[1] == (blank,)


@pytest.mark.parametrize("service", [DetectService(), CaptionService(), ZoomService()])
def test_a_broken_image_is_passed_on(service: DetectService | CaptionService | ZoomService) -> None:
    assert service.run((b"broken",), "") == ("", (b"broken",))
