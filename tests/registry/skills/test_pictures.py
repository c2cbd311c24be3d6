"""Crops and drawn boxes: the right pixels, whatever frame the model counted in."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from maestro_jax.registry.description.boxes import Box, Frame, read_boxes
from maestro_jax.registry.skills.pictures import SHORTEST_SIDE, crops, drawn, shown_size, upright

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def scene(width: int = 1000, height: int = 700, patch: tuple[int, int, int, int] = (600, 300, 700, 400)) -> Image.Image:
    picture = Image.new("RGB", (width, height), WHITE)
    picture.paste(RED, patch)
    return picture


@pytest.mark.parametrize(
    ("frame", "numbers"),
    [
        (Frame(), [600, 300, 700, 400]),
        (Frame("relative"), [600, 300 / 0.7, 700, 400 / 0.7]),
        (Frame("resized"), [600 * 1.008, 300, 700 * 1.008, 400]),
        # A server that shows the model at most 100,000 pixels: 364 x 252 of them.
        (Frame("resized", max_pixels=100_000), [600 * 0.364, 300 * 0.36, 700 * 0.364, 400 * 0.36]),
    ],
)
def test_a_crop_holds_what_the_model_pointed_at(frame: Frame, numbers: list[float]) -> None:
    image = encoded(scene())
    text = f'{{"bbox_2d": {numbers}}}'
    (crop,) = crops([image], read_boxes(text, [shown_size(image)], frame), margin=0.0, most=4)
    found = pixels(crop)
    assert abs(found.shape[0] - 100) <= 1 and abs(found.shape[1] - 100) <= 1
    assert (found == RED).all(axis=-1).mean() > 0.97


def test_a_margin_ends_at_the_edge() -> None:
    box = Box(0, "", 0, 100, 200, 300)
    (crop,) = crops([encoded(scene())], [box], margin=0.5, most=1)
    assert pixels(crop).shape == (400, 300, 3)  # 0 to 400 downwards, 0 to 300 across: no room on the left


@pytest.mark.parametrize(
    "box", [Box(0, "", 0, 0, 1, 1), Box(0, "", 999, 699, 1000, 700), Box(0, "", 500, 300, 501, 301)]
)
def test_a_crop_is_never_thinner_than_encoders_take(box: Box) -> None:
    (crop,) = crops([encoded(scene())], [box], margin=0.0, most=1)
    assert min(pixels(crop).shape[:2]) >= SHORTEST_SIDE


def test_a_picture_smaller_than_that_is_cropped_to_itself() -> None:
    (crop,) = crops([encoded(scene(10, 8, (0, 0, 5, 5)))], [Box(0, "", 2, 2, 4, 4)], margin=0.0, most=1)
    assert pixels(crop).shape == (8, 10, 3)


def test_only_so_many_crops_and_each_from_its_picture() -> None:
    images = [encoded(scene()), encoded(Image.new("RGB", (50, 60), "blue"))]
    boxes = [Box(1, "", 0, 0, 50, 60), Box(0, "", 600, 300, 700, 400), Box(0, "", 0, 0, 100, 100)]
    first, second = crops(images, boxes, margin=0.0, most=2)
    assert pixels(first).shape == (60, 50, 3) and (pixels(second) == RED).all()


def test_boxes_are_drawn_on_their_pictures_only() -> None:
    images = [encoded(Image.new("RGB", (300, 200), WHITE))] * 2
    first, second = drawn(images, [Box(1, "cup", 50, 60, 150, 160)])
    assert first == images[0]
    assert tuple(pixels(second)[60, 100]) == (255, 0, 255) and tuple(pixels(second)[110, 100]) == WHITE


def test_turned_photographs_are_cropped_as_they_are_shown() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    stored = scene(700, 1000, (0, 0, 350, 500))  # the upper left quarter, shown on the upper right
    image = encoded(stored, "JPEG", exif=exif, quality=95)
    assert shown_size(image) == (1000, 700)
    assert pixels(upright(image)).shape == (700, 1000, 3)
    (crop,) = crops([image], [Box(0, "", 510, 10, 990, 340)], margin=0.0, most=1)
    assert abs(pixels(crop).astype(int) - RED).max() < 10


def test_upright_pictures_stay_as_they_are() -> None:
    image = encoded(scene())
    assert upright(image) is image


def test_a_picture_too_large_to_decode_is_not_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(Image.new("L", (9000, 8000)), "JPEG", exif=exif)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert upright(image) is image


def test_what_is_no_image_gives_no_crop_and_passes_by() -> None:
    broken = b"\x89PNG\r\n\x1a\n broken"
    assert shown_size(broken) == (0, 0) and upright(broken) == broken
    assert crops([broken], [Box(0, "", 0, 0, 5, 5)], margin=0.0, most=1) == ()
    assert drawn([broken], [Box(0, "", 0, 0, 5, 5)]) == (broken,)
