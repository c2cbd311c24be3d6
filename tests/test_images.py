"""Encoded images are judged before they are decoded, and come out as RGB on white."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from maestro_jax.errors import DataError
from maestro_jax.images import check_image, decode_image, is_turned


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels: what a decompression bomb looks like from outside."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [body, b"IDAT" + zlib.compress(b"")]
    framed = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + framed


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_allowed_formats_decode(kind: str) -> None:
    data = encode(Image.new("RGB", (6, 4), (200, 30, 40)), kind)
    assert check_image(data, "x") == (6, 4)
    pixels = decode_image(data, "x")
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[0, 0], (200, 30, 40), atol=6)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="row 3, images.*convert the image"):
        check_image(encode(Image.new("RGB", (6, 4)), kind), "row 3, images[0]")


def test_transparent_becomes_white() -> None:
    data = encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert decode_image(data, "x").tolist() == [[[255] * 3] * 2] * 2


def test_transparent_palette_becomes_white() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encode(image, transparency=1), "x")[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_keeps_its_range() -> None:
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert decode_image(encode(grey), "x")[0, :, 0].tolist() == [0, 127, 255]


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert check_image(data, "x") == (4, 8)
    assert decode_image(data, "x").shape == (8, 4, 3)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(9000, 9000), (11000, 11000), (60000, 60000)])
def test_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="^row 1: .*scale the image down"):
        decode_image(png_header(*size), "row 1")


def test_pixel_cap_is_inclusive() -> None:
    data = encode(Image.new("RGB", (4, 4)))
    assert check_image(data, "x", max_pixels=16) == (4, 4)
    with pytest.raises(DataError, match="4x4 = 16 pixels, at most 15"):
        check_image(data, "x", max_pixels=15)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_image_is_named(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(DataError, match="^row 7: .*remove the row") as caught:
        decode_image(data[: len(data) // 2], "row 7")
    assert "\n" not in str(caught.value)


def test_empty_bytes() -> None:
    with pytest.raises(DataError, match="empty"):
        check_image(b"", "x")


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 255))
def test_a_flipped_byte_gives_pixels_or_a_data_error(position: int, value: int) -> None:
    data = bytearray(encode(Image.new("RGB", (9, 9), (1, 2, 3)), "WEBP"))
    data[position % len(data)] = value
    try:
        assert decode_image(bytes(data), "x").ndim == 3
    except DataError as error:
        assert "\n" not in str(error)


def test_judging_a_png_decodes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes all of it to look for EXIF behind the pixels."""
    data = encode(Image.new("RGB", (6, 4)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert check_image(data, "x") == (6, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_sizes_pixels_and_orientation_agree(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (6, 4)), kind, exif=exif)
    assert is_turned(data, "x") and check_image(data, "x") == (4, 6) and decode_image(data, "x").shape == (6, 4, 3)
