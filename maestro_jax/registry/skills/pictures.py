"""What skills do with pictures: crops and drawn boxes. Encoded images in, PNG files out; plain synchronous functions.

A picture that cannot be decoded is foreign, not a fault: it gives no crop and is passed on without boxes.
"""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from maestro_jax.errors import DataError
from maestro_jax.images import check_image, decode_image, is_turned
from maestro_jax.registry.description.boxes import Box

SHORTEST_SIDE = 28  # pixels of a crop: vision encoders refuse what is thinner than a patch
_INK = (255, 0, 255)  # seldom in photographs and charts


def shown_size(image: bytes) -> tuple[int, int]:
    """(width, height) in pixels as shown; (0, 0) for what is no image."""
    try:
        return check_image(image, "picture")
    except DataError:
        return 0, 0


def upright(image: bytes) -> bytes:
    """The image with its EXIF rotation applied: not every server does that, and boxes are read in the frame it saw."""
    try:
        return _png(Image.fromarray(decode_image(image, "picture"))) if is_turned(image, "picture") else image
    except DataError:
        return image


def crops(images: Sequence[bytes], boxes: Sequence[Box], margin: float, most: int) -> tuple[bytes, ...]:
    """The first `most` boxes cut out of their pictures.

    Args:
      margin: added on each side, as a share of the box's own width and height; the edge of the picture ends it.
    """
    made = []
    for box in boxes[:most]:
        picture = _decoded(images[box.image])
        if picture is not None:
            left, right = _stretched(box.left, box.right, margin, picture.width)
            top, bottom = _stretched(box.top, box.bottom, margin, picture.height)
            made.append(_png(picture.crop((left, top, right, bottom))))
    return tuple(made)


def drawn(images: Sequence[bytes], boxes: Sequence[Box]) -> tuple[bytes, ...]:
    """The pictures with the boxes drawn on them, numbered as in `write_boxes`. Labels are foreign and stay outside."""
    return tuple(_drawn(image, number, boxes) for number, image in enumerate(images))


def _drawn(image: bytes, number: int, boxes: Sequence[Box]) -> bytes:
    numbered = [(count, box) for count, box in enumerate(boxes, start=1) if box.image == number]
    picture = _decoded(image) if numbered else None
    if picture is None:
        return image
    draw = ImageDraw.Draw(picture)
    stroke = max(2, min(picture.size) // 300)
    font = ImageFont.load_default(max(12, min(picture.size) // 40))
    for count, box in numbered:
        draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), outline=_INK, width=stroke)
        tag = (box.left + stroke, box.top + stroke)
        draw.rectangle(draw.textbbox(tag, str(count), font), fill=_INK)
        draw.text(tag, str(count), "white", font)
    return _png(picture)


def _stretched(low: int, high: int, margin: float, most: int) -> tuple[int, int]:
    """One axis of a box with its margin, at least SHORTEST_SIDE long where the picture is, inside the picture."""
    pad = round(max(margin * (high - low), (SHORTEST_SIDE - (high - low)) / 2, 0))
    low, high = max(0, low - pad), min(most, high + pad)
    short = max(0, min(SHORTEST_SIDE, most) - (high - low))  # the edge of the picture took some of it
    return max(0, low - short), min(most, high + short)


def _decoded(image: bytes) -> Image.Image | None:
    try:
        return Image.fromarray(decode_image(image, "picture"))
    except DataError:
        return None


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # most of the time goes into compressing
    return file.getvalue()
