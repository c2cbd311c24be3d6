"""Tally: the counter. It counts listed objects well, and patches of pixels crudely.

In come the question, the `Objects:` block when the skill ran detection, and the image. Out goes a
number, or yes/no for "is there ...". It names nothing and reads nothing.
"""

import re
from collections.abc import Sequence

import cv2
import numpy as np

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists.prompting import UNKNOWN, last_user, pixels
from maestro_jax.suite.specialists.shapes import find_regions, is_negated, is_polar, words_asked

_COUNTS = re.compile(r"\bhow many\b|\bnumber of\b|\bcount\b|\btally\b")


class Tally:
    """Counts what the question names, among detected objects or among blobs of the image."""

    def __init__(self, input_side: int = 40) -> None:
        self._input_side = input_side

    def answer(self, messages: Sequence[Message]) -> str:
        prompt, images = last_user(messages)
        question = prompt.asked.lower()
        colour, kind = words_asked(question)
        polar = is_polar(question) and bool(colour or kind) and not is_negated(question)  # absence is not counted
        if not polar and not _COUNTS.search(question):
            return UNKNOWN
        if prompt.objects is not None:
            names = [item.text.lower().split() for item in prompt.objects]
        elif (rgb := pixels(images[0]) if images else None) is not None:
            names = self._blobs(rgb)
        else:
            return UNKNOWN
        number = sum({colour, kind} - {""} <= set(name) for name in names)
        return ("yes" if number else "no") if polar else str(number)

    def _blobs(self, rgb: np.ndarray) -> list[list[str]]:
        """Colour and kind of blobs in a coarse view: neighbours of one colour melt, small shapes blur."""
        small = cv2.resize(rgb, (self._input_side, self._input_side), interpolation=cv2.INTER_AREA)
        return [[region.colour, region.kind] for region in find_regions(small, min_area=4)]
