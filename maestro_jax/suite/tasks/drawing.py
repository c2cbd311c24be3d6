"""Drawing for the offline suite's domains: fonts and PNG bytes, the same on every machine.

In come PIL images, out go PNG bytes. The font is the one inside Pillow, so that a picture does
not depend on what is installed on the machine that renders it.
"""

import functools
import io

from PIL import Image, ImageDraw, ImageFont


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font at a size in pixels."""
    return ImageFont.load_default(size)


def centered(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: str | tuple[int, int, int] = "black"
) -> None:
    """Writes one line of text with its middle at a point."""
    draw.text(at, text, font=font(size), fill=fill, anchor="mm")


def encode(image: Image.Image) -> bytes:
    """PNG bytes of an RGB image."""
    buffer = io.BytesIO()
    # level 1: pictures are tiny and the whole suite is rendered on first use
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
