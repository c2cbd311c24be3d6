"""The suite's in-process services: detection, captioning and zoom, all plain pixel work.

In come encoded images and the text of the call, out go text for a prompt and images for the stages
after it. An image that cannot be decoded yields no text and is passed on unchanged.
"""

import cv2
import numpy as np

from maestro_jax.suite.specialists.prompting import pixels, png, write_items
from maestro_jax.suite.specialists.shapes import find_regions, ground, salient


class DetectService:
    """Lists patches of one colour as `colour kind @ box` lines and draws their boxes."""

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        lines, drawn = [], []
        for image in images:
            rgb = pixels(image)
            if rgb is None:
                drawn.append(image)
                continue
            items = [region.item for region in find_regions(rgb)]
            lines.append(write_items(items))
            for item in items:
                cv2.rectangle(rgb, (item.left, item.top), (item.right - 1, item.bottom - 1), (255, 0, 255), 1)
            drawn.append(png(rgb))
        return "\n".join(filter(None, lines)), tuple(drawn)


class CaptionService:
    """One factual sentence per image: ground, number of patches, their most frequent colours."""

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        arrays = (pixels(image) for image in images)
        return " ".join(_caption(rgb) for rgb in arrays if rgb is not None), images


def _caption(rgb: np.ndarray) -> str:
    level = float(ground(rgb).mean())
    shade = "white" if level > 250 else "light" if level > 180 else "dark" if level < 75 else "mid-tone"
    regions = find_regions(rgb)
    if not regions:
        return f"A {shade} picture without filled patches."
    areas: dict[str, int] = {}
    for region in regions:
        areas[region.colour] = areas.get(region.colour, 0) + region.area
    colours = sorted(areas, key=lambda name: (-areas[name], name))[:2]
    noun = "patch" if len(regions) == 1 else "patches"
    return f"A {shade} picture with {len(regions)} {noun}, mostly {' and '.join(colours)}."


class ZoomService:
    """Crops round the patch that stands out, with a margin, and enlarges it to the input's longer side."""

    def __init__(self, margin: float = 0.75) -> None:
        self._margin = margin

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        return "", tuple(self._crop(image) for image in images)

    def _crop(self, image: bytes) -> bytes:
        rgb = pixels(image)
        patch = None if rgb is None else salient(rgb)
        if rgb is None or patch is None:
            return image
        _, left, top, right, bottom = patch
        height, width = rgb.shape[:2]
        pad = max(2, round(self._margin * max(right - left, bottom - top)))
        # beyond the image's edge the crop goes on in the ground's colour, so that the patch stays in the middle
        shade = tuple(round(float(level)) for level in ground(rgb))
        padded = cv2.copyMakeBorder(rgb, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=shade)
        crop = padded[top : bottom + 2 * pad, left : right + 2 * pad]
        scale = max(height, width) / max(crop.shape[:2])
        size = (max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale)))
        return png(cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC))
