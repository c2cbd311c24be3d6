"""Shape-Sight, and the shape vision it shares with the counter and the services.

In come RGB pixels, out go regions (colour, kind, box) and, for the expert, short answers about the
one object that stands out. Shape-Sight looks like any small vision encoder: at the middle of what it
is given, through a fixed, small input. What is small is a blur and what is far off the middle is cut,
so it is at its best with a crop.

The constants below were calibrated on easy-VQA's train split only: pure colours, light ground,
upright rectangles, circles and triangles of 8 to 33 pixels.
"""

import dataclasses
import re
from collections.abc import Sequence

import cv2
import numpy as np

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists.prompting import UNKNOWN, Item, last_user, pixels

PALETTE = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
KINDS = ("circle", "rectangle", "triangle")

_COLOURS = np.array(list(PALETTE.values()), np.float32)
_MIN_CONTRAST = 40  # grey levels from the ground; grounds vary by 25, the palest shape differs by 89
# Opening with an even kernel by cv2.morphologyEx shifts by a pixel, hence the two anchors in find_regions.
_PIXELS = np.ones((2, 2), np.uint8)
_FILLS = np.array([0.79, 1.0, 0.58], np.float32)  # medians over the train split, in the order of KINDS


@dataclasses.dataclass(frozen=True)
class Region:
    """A connected patch of one colour; box in pixels, right and bottom exclusive."""

    colour: str
    kind: str
    left: int
    top: int
    right: int
    bottom: int
    area: int

    @property
    def item(self) -> Item:
        return Item(f"{self.colour} {self.kind}", self.left, self.top, self.right, self.bottom)


def ground(rgb: np.ndarray) -> np.ndarray:
    """The most frequent colour of the border, float32 [3]."""
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    coarse = (border >> 4).astype(np.int32) @ np.array([256, 16, 1])
    frequent: np.ndarray = border[coarse == np.argmax(np.bincount(coarse))].mean(axis=0)
    return frequent.astype(np.float32)


def contrast(rgb: np.ndarray) -> np.ndarray:
    """Largest channel difference from the ground, float32 [height, width]."""
    difference: np.ndarray = np.abs(rgb.astype(np.float32) - ground(rgb)).max(axis=-1)
    return difference


def colour_name(rgb: np.ndarray) -> str:
    """The palette colour nearest to one RGB value."""
    return list(PALETTE)[int(((_COLOURS - rgb) ** 2).sum(-1).argmin())]


def kind_name(fill: float) -> str:
    """The kind whose share of its bounding box is nearest."""
    return KINDS[int(np.argmin(np.abs(_FILLS - fill)))]


def find_regions(rgb: np.ndarray, min_area: int = 24, limit: int = 24) -> list[Region]:
    """Connected patches of one palette colour, largest first; uint8 RGB [height, width, 3]."""
    foreground = contrast(rgb) > _MIN_CONTRAST
    nearest = ((rgb[:, :, None].astype(np.float32) - _COLOURS) ** 2).sum(-1).argmin(-1)
    found = []
    for index in np.unique(nearest[foreground]):
        layer = ((nearest == index) & foreground).astype(np.uint8)
        # blends along an edge look like another colour: they are one pixel wide and vanish here
        opened = cv2.dilate(cv2.erode(layer, _PIXELS, anchor=(0, 0)), _PIXELS, anchor=(1, 1))
        _, marks, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
        for mark, (left, top, width, height, area) in enumerate(stats[1:].tolist(), start=1):
            if area < min_area or min(width, height) < 4:
                continue
            colour = colour_name(np.median(rgb[marks == mark], axis=0))
            kind = kind_name(area / (width * height))
            found.append(Region(colour, kind, left, top, left + width, top + height, area))
    return sorted(found, key=lambda region: (-region.area, region.top, region.left))[:limit]


def salient(rgb: np.ndarray, min_area: int = 2) -> tuple[np.ndarray, int, int, int, int] | None:
    """The largest patch that stands out: its mask [height, width] and box; None on an empty image."""
    difference = contrast(rgb)
    if (peak := float(difference.max())) <= _MIN_CONTRAST:
        return None
    foreground = (difference > max(_MIN_CONTRAST, peak / 2)).astype(np.uint8)
    _, marks, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=8)
    best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    left, top, width, height, area = stats[best].tolist()
    return (marks == best, left, top, left + width, top + height) if area >= min_area else None


def words_asked(question: str) -> tuple[str, str]:
    """The colour and the kind a question names ("" when it names none), singular."""
    words = [word.rstrip("s") for word in re.findall(r"[a-z]+", question.lower())]
    colour = next((word for word in words if word in PALETTE), "")
    kind = next((word for word in words if word in KINDS), "")
    return colour, kind


def is_polar(question: str) -> bool:
    """Whether the question wants yes or no."""
    return re.match(r"\s*(is|are|does|do|has|have|can)\b", question.lower()) is not None


def is_negated(question: str) -> bool:
    """Whether a yes/no question asks for absence ("is there not ...", "is no ... present")."""
    return re.search(r"\b(not|no)\b|n't\b", question.lower()) is not None


class ShapeSight:
    """Names colour and kind of the one object that stands out, and answers yes/no questions about it."""

    def __init__(self, input_side: int = 12, view: float = 0.45) -> None:
        self._input_side = input_side
        self._view = view  # share of each side that the centre crop keeps

    def answer(self, messages: Sequence[Message]) -> str:
        prompt, images = last_user(messages)
        rgb = pixels(images[0]) if images else None
        seen = None if rgb is None else self._look(rgb)
        return UNKNOWN if seen is None else _reply(prompt.asked, *seen)

    def _look(self, rgb: np.ndarray) -> tuple[str, str] | None:
        """Colour and kind of the salient object, seen at the encoder's own resolution."""
        cut_y, cut_x = (round(side * (1 - self._view) / 2) for side in rgb.shape[:2])
        middle = rgb[cut_y : rgb.shape[0] - cut_y, cut_x : rgb.shape[1] - cut_x]
        small = cv2.resize(middle, (self._input_side, self._input_side), interpolation=cv2.INTER_AREA)
        patch = salient(small)
        if patch is None:
            return None
        mask, left, top, right, bottom = patch
        inside = small[mask].astype(np.float32)
        strongest = contrast(small)[mask]
        colour = colour_name(inside[strongest >= np.quantile(strongest, 0.5)].mean(axis=0))
        return colour, kind_name(float(mask.sum()) / ((right - left) * (bottom - top)))


def _reply(question: str, colour: str, kind: str) -> str:
    asked = question.lower()
    wanted_colour, wanted_kind = words_asked(asked)
    fits = wanted_colour in ("", colour) and wanted_kind in ("", kind)
    if re.search(r"\bhow many\b|\bnumber of\b|\bcount\b", asked):
        return "1" if fits else "0"  # one object is all it ever sees
    if is_polar(asked) and (wanted_colour or wanted_kind):
        return "yes" if fits != is_negated(asked) else "no"
    if re.search(r"\bcolou?r\b", asked):
        return colour
    if re.search(r"\bshape\b|\bkind\b|\bobject\b", asked):
        return kind
    return UNKNOWN
