"""Images at the border: encoded bytes from anywhere come in, checked sizes or RGB arrays go out.

Data sets are untrusted: only three formats are opened, the size in the header is judged before a
single pixel is decoded (decompression bombs), and whatever a decoder dislikes becomes one line.
"""

import io

import numpy as np
from PIL import Image, ImageOps

from maestro_jax.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000  # HR-Bench 8K has images of 33 million and more; decoded, this is 192 MB

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def check_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Judges an encoded image by its header, without decoding pixels.

    Args:
      data: encoded PNG, JPEG or WebP file.
      where: what to blame in the error, e.g. "train.parquet row 3, images[0]".
      max_pixels: largest allowed width x height.

    Returns:
      (width, height) in pixels, as shown (after EXIF rotation).

    Raises:
      DataError: not an allowed format, a damaged header, or too many pixels.
    """
    image = _open(data, where, max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def is_turned(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether the image is shown otherwise than it is stored; arguments and errors as of `check_image`."""
    return _orientation(_open(data, where, max_pixels)) != 1


def decode_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image to RGB; transparent parts become white, EXIF rotation is applied.

    Args:
      data: encoded PNG, JPEG or WebP file; of an animation the first frame counts.
      where: what to blame in the error.
      max_pixels: largest allowed width x height, judged before decoding.

    Returns:
      uint8 [height, width, 3].

    Raises:
      DataError: as `check_image`, or pixels that cannot be decoded.
    """
    image = _open(data, where, max_pixels)
    turned = _orientation(image) != 1
    try:
        image.load()
        if turned:
            image = ImageOps.exif_transpose(image)
        return np.array(_flatten(image))
    except Exception as error:  # decoders raise nearly anything on hostile bytes; all of it means "damaged"
        raise DataError(f"{where}: image is damaged ({_reason(error)}); replace the image or remove the row") from error


def _open(data: bytes, where: str, max_pixels: int) -> Image.Image:
    if not data:
        raise DataError(f"{where}: image is empty (0 bytes); replace the image or remove the row")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{where}: {_reason(error)}; scale the image down to {max_pixels} pixels") from error
    except Exception as error:
        raise DataError(
            f"{where}: not a readable PNG, JPEG or WebP image ({len(data)} bytes); "
            "replace or convert the image, or remove the row"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{where}: image has {width}x{height} = {width * height} pixels, at most {max_pixels} are allowed; "
            "scale the image down"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """As EXIF says; 1 is upright. A PNG may say it behind its pixels: not worth decoding all of them to look."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the picture unusable
        return 1


def _flatten(image: Image.Image) -> Image.Image:
    """RGB on white. 16-bit grey is scaled, since Pillow would clip it."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float32) / 257.0
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _reason(error: BaseException) -> str:
    """The first line of an error, short enough for one log line."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
