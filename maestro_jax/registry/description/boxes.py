"""Boxes in pictures: what a model wrote in its own coordinates in, clamped pixels out.

Models disagree about what their numbers mean, and what they write is foreign text: it is read as JSON and nothing
else, numbers are clamped to the picture, and whatever is no box is left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from maestro_jax.strict_json import DECODER

MOST_BOXES = 64
LONGEST_LABEL = 40
PER_MILLE = 1000  # boxes are written for later prompts in thousandths of width and height

_LONGEST_TEXT = 32_768  # characters that are searched for JSON
_MOST_TRIES = 32  # places that look like JSON and are none
_OPENING = re.compile(r"[\[{]")

FRAMES = ("pixels", "relative", "resized")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a model's box coordinates mean.

    Attributes:
      kind: "pixels" of the picture as it was sent; "relative", where each axis runs from 0 to `full` (Qwen3-VL and
        GLM-V: 1000); "resized", pixels of the picture after the model's own resizing (Qwen2.5-VL and what was trained
        from it). Sources: QwenLM/Qwen3-VL issues 676 and 1741; the grounding skill of zai-org/GLM-skills.
      multiple, min_pixels, max_pixels: of that resizing, as in Qwen2.5-VL's preprocessor_config.json.
    """

    kind: str = "pixels"
    full: float = 1000.0
    multiple: int = 28
    min_pixels: int = 3136
    max_pixels: int = 12_845_056

    def size(self, width: int, height: int) -> tuple[float, float]:
        """(width, height) in the model's coordinates of a picture of so many pixels."""
        if self.kind == "relative":
            return self.full, self.full
        if self.kind == "resized":
            return self._resized(width, height)
        return float(width), float(height)

    def _resized(self, width: int, height: int) -> tuple[float, float]:
        """Both sides a multiple, the area within limits: `smart_resize` of transformers' Qwen2-VL image processor."""
        sides = [round(side / self.multiple) for side in (width, height)]
        area = sides[0] * sides[1] * self.multiple**2
        # The order of operations is theirs: another one rounds to another multiple now and then.
        if area > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            sides = [max(1, math.floor(side / shrink / self.multiple)) for side in (width, height)]
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            sides = [math.ceil(side * grow / self.multiple) for side in (width, height)]
        return float(sides[0] * self.multiple), float(sides[1] * self.multiple)


@dataclasses.dataclass(frozen=True)
class Box:
    """A box in pixels of picture number `image` (from 0); right and bottom exclusive, at least one pixel large."""

    image: int
    label: str
    left: int
    top: int
    right: int
    bottom: int


def read_boxes(text: str, sizes: Sequence[tuple[int, int]], frame: Frame) -> tuple[Box, ...]:
    """The boxes in a model's text, clamped to their pictures; empty if it has none.

    Read are JSON objects with "bbox_2d": [left, top, right, bottom], maybe a "label" and an "image" (counted from 1,
    the first unless said), alone, in a list, under "objects", or as the "arguments" of a tool call. Of a list that was
    cut off, the whole objects count.

    Args:
      sizes: (width, height) in pixels of the pictures that the model saw.
      frame: what its numbers mean.
    """
    found: list[Box] = []
    for entry in _entries(text[:_LONGEST_TEXT]):
        box = _box(entry, sizes, frame)
        if box is not None and box not in found:
            found.append(box)
        if len(found) == MOST_BOXES:
            break
    return tuple(found)


def write_boxes(boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> str:
    """A numbered line per box, in thousandths of width and height, so that any model can read it."""
    lines = []
    for number, box in enumerate(boxes, start=1):
        width, height = sizes[box.image]
        corners = zip((box.left, box.top, box.right, box.bottom), (width, height) * 2, strict=True)
        place = ", ".join(str(round(at * PER_MILLE / side)) for at, side in corners)
        picture = f" in picture {box.image + 1}" if len(sizes) > 1 else ""
        lines.append(f"{number}. {box.label} [{place}]{picture}")
    return "\n".join(lines)


def _entries(text: str) -> Iterator[dict[str, Any]]:
    """Every object with a box, of every JSON value in `text`."""
    at, tries = 0, 0
    while tries < _MOST_TRIES and (opening := _OPENING.search(text, at)):
        try:
            value, at = DECODER.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            at, tries = opening.end(), tries + 1
            continue
        yield from _with_boxes(value)


def _with_boxes(value: Any) -> list[dict[str, Any]]:
    """The objects with a box in one JSON value; nothing deeper than the forms in `read_boxes`."""
    if isinstance(value, dict) and "bbox_2d" not in value:
        value = value.get("objects", value.get("arguments"))
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, dict) and "bbox_2d" in entry]


def _box(entry: dict[str, Any], sizes: Sequence[tuple[int, int]], frame: Frame) -> Box | None:
    numbers, image = entry["bbox_2d"], entry.get("image", 1)
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(_is_number(number) for number in numbers):
        return None
    if not _is_number(image) or image not in range(1, len(sizes) + 1):
        return None
    width, height = sizes[int(image) - 1]
    if not width or not height:  # the picture is none
        return None
    full = frame.size(width, height) * 2
    # Clamped before anything is computed with them: a number may have 4,000 digits.
    shares = [min(max(number, 0), most) / most for number, most in zip(numbers, full, strict=True)]
    left, top = math.floor(shares[0] * width), math.floor(shares[1] * height)
    right, bottom = math.ceil(shares[2] * width), math.ceil(shares[3] * height)
    if left >= right or top >= bottom:
        return None
    return Box(int(image) - 1, _label(entry.get("label")), left, top, right, bottom)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any) -> str:
    """One short line; foreign text."""
    return " ".join(value.split())[:LONGEST_LABEL] if isinstance(value, str) and value.strip() else "object"
