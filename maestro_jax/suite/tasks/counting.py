"""The suite's counting questions: shapes cut out of real easy-VQA images, several on one canvas.

In come the images of one split of easy-VQA and what the set's own questions tell about them (no
colour or shape is read from pixels), out go tasks such as "how many red circles are there?".
Held-out canvases use shapes of easy-VQA's test images only.
"""

import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from maestro_jax.suite.tasks import drawing, visual_qa
from maestro_jax.types import Task

SOURCE = "counting"
SIDE = 128
MOST = 9  # shapes on one canvas

_TEMPLATES = (
    "how many {} are there?",
    "how many {} can you see?",
    "count the {}.",
    "what is the number of {} in the image?",
    "how many {} does the picture contain?",
)


class Placed(NamedTuple):
    """One shape on the canvas, by the labels of the published set."""

    colour: str
    kind: str


@functools.cache
def labels(split: str) -> dict[int, Placed]:
    """Image number → colour and kind, for the images whose open questions tell both."""
    known: dict[int, dict[str, str]] = {}
    for row in visual_qa.rows(split):
        if row.answer in ("yes", "no"):
            continue
        for word in (*row.question.rstrip("?").split(), row.answer):  # "what color is the circle?" tells the kind too
            if (name := visual_qa.answer_kind(word)) in ("colour", "kind"):
                known.setdefault(row.image, {})[name] = word
    return {image: Placed(**found) for image, found in sorted(known.items()) if len(found) == 2}


@functools.lru_cache(maxsize=1024)
def cutout(split: str, image: int) -> tuple[np.ndarray, np.ndarray]:
    """A shape's own pixels: RGB crop [h, w, 3] and where they are not ground, bool [h, w]."""
    rgb = np.asarray(Image.open(visual_qa.image_paths(split)[image]).convert("RGB"))
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    ground = np.median(border, axis=0)  # one shape never covers half of the border
    mask = np.abs(rgb - ground).max(-1) > 24
    ys, xs = np.nonzero(mask)
    window = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return rgb[window], mask[window]


def compose(split: str, images: list[int], rng: random.Random) -> tuple[np.ndarray, list[int]]:
    """Pastes shapes where their boxes do not overlap; returns the canvas and the images that found room."""
    canvas = np.full((SIDE, SIDE, 3), [rng.randint(230, 255) for _ in range(3)], np.uint8)
    taken = np.zeros((SIDE, SIDE), bool)
    placed = []
    for image in images:
        crop, mask = cutout(split, image)
        height, width = mask.shape
        for _ in range(60):
            top, left = rng.randint(0, SIDE - height), rng.randint(0, SIDE - width)
            window = np.s_[top : top + height, left : left + width]
            if not taken[window].any():
                canvas[window][mask] = crop[mask]
                taken[window] = True
                placed.append(image)
                break
    return canvas, placed


def _choose_images(split: str, rng: random.Random) -> list[int]:
    """Between 3 and `MOST` images of few colours and kinds, so that counts differ from 0 and 1."""
    colours = rng.sample(visual_qa.COLOURS, rng.randint(2, 3))
    kinds = rng.sample(visual_qa.KINDS, rng.randint(2, 3))
    fitting = [image for image, label in labels(split).items() if label.colour in colours and label.kind in kinds]
    return rng.sample(fitting, min(rng.randint(3, MOST), len(fitting)))


def _choose_noun(present: list[Placed], rng: random.Random) -> tuple[str, int]:
    """What to count, in the plural, and how many there are: all, one colour, one kind, or both."""
    sample = rng.choice(present)
    colour, kind = rng.choice([("", ""), (sample.colour, ""), ("", sample.kind), (sample.colour, sample.kind)])
    if rng.random() < 0.1 and colour:  # sometimes a colour that may be absent
        colour = rng.choice(visual_qa.COLOURS)
    number = sum(colour in ("", label.colour) and kind in ("", label.kind) for label in present)
    return f"{colour} {kind or 'shape'}s".strip(), number


def tasks(split: str, count: int, seed: int) -> Iterator[Task]:
    """Yields `count` tasks of a split; every canvas is composed anew."""
    for number in range(count):
        rng = random.Random(f"{SOURCE}/{split}/{seed}/{number}")
        canvas, placed = compose(split, _choose_images(split, rng), rng)
        noun, answer = _choose_noun([labels(split)[image] for image in placed], rng)
        question = rng.choice(_TEMPLATES).format(noun)
        image = drawing.encode(Image.fromarray(canvas))
        yield Task(f"{SOURCE}/{split}/{number:05d}", question, (image,), (str(answer),), SOURCE)
