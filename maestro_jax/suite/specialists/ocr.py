"""Reading text from pixels: the `ocr` service and the expert Glyph-Reader, over one shared network.

In come encoded images (and, for the expert, the prompt of a skill). Out go `text @ x0,y0,x1,y1` lines,
or a short answer read off the picture. The network is RapidOCR, whose weights ship in its wheel.
"""

import difflib
import hashlib
import itertools
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists import prompting

# Pages remembered by image hash; a page is a few hundred bytes.
_MEMORY = 4096
# Two words are the same label when this similar; OCR confuses about one letter in six on small text.
_SIMILAR = 0.75
# Of what is compared with each other, since page and question are foreign; the first of each count.
_MOST_BOXES, _MOST_WORDS, _LONGEST_LABEL = 256, 32, 64
_TINY_WORDS = frozenset(("the", "on", "in", "of", "is", "to", "at", "for", "what", "which"))


class Engine:
    """The OCR network, created at first use and run by one thread at a time; pages are remembered by image hash."""

    def __init__(self, memory: int = _MEMORY):
        self._lock = threading.Lock()
        self._network: Any = None
        self._pages: LRUCache[bytes, tuple[prompting.Item, ...]] = LRUCache(memory)

    def read(self, image: bytes) -> tuple[prompting.Item, ...]:
        """Text boxes of an encoded image in reading order; none when it holds no text or cannot be decoded."""
        key = hashlib.sha1(image).digest()
        with self._lock:
            if key not in self._pages:
                self._pages[key] = self._recognise(image)
            return self._pages[key]

    def _recognise(self, image: bytes) -> tuple[prompting.Item, ...]:
        rgb = prompting.pixels(image)
        if rgb is None or min(rgb.shape[:2]) < 8:
            return ()
        found = self._loaded()(np.ascontiguousarray(rgb[:, :, ::-1]), use_cls=False)
        boxes = zip(found.boxes, found.txts, strict=True) if found.txts else ()
        return reading_order([_item(polygon, text) for polygon, text in boxes if text.strip()])

    def _loaded(self) -> Any:
        if self._network is None:
            import rapidocr  # half a second: only when something is to be read

            models = Path(rapidocr.__file__).parent / "models"
            self._network = rapidocr.RapidOCR(
                params={
                    "Global.log_level": "error",  # a page without text is no news
                    "Det.model_path": str(models / "ch_PP-OCRv4_det_mobile.onnx"),  # unnamed ones may be downloaded
                    "Rec.model_path": str(models / "ch_PP-OCRv4_rec_mobile.onnx"),
                    "Det.limit_side_len": 256,
                    "Det.limit_type": "max",
                    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                }
            )
        return self._network


ENGINE = Engine()  # shared by the service and the expert, so that one image is read once


def _item(polygon: Sequence[Sequence[float]], text: str) -> prompting.Item:
    corners = np.asarray(polygon)
    left, top = corners.min(0).round().astype(int)
    right, bottom = corners.max(0).round().astype(int)
    return prompting.Item(text.strip(), int(left), int(top), int(right), int(bottom))


def reading_order(items: Sequence[prompting.Item]) -> tuple[prompting.Item, ...]:
    """Rows from top to bottom, each from left to right."""
    return tuple(item for row in rows(items) for item in row)


def rows(items: Sequence[prompting.Item]) -> list[list[prompting.Item]]:
    """Groups boxes whose middles lie within half a line height of the row's first box."""
    grouped: list[list[prompting.Item]] = []
    for item in sorted(items, key=lambda item: item.center[1]):
        if grouped and item.center[1] - grouped[-1][0].center[1] < 0.5 * max(item.height, grouped[-1][0].height):
            grouped[-1].append(item)
        else:
            grouped.append([item])
    return [sorted(row, key=lambda item: item.left) for row in grouped]


class OcrService:
    """Text of the images as `text @ x0,y0,x1,y1` lines in reading order; returns no images."""

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        """One line per text box, image after image; `text` is not used."""
        del text
        return prompting.write_items(item for image in images for item in ENGINE.read(image)), ()


class GlyphReader:
    """An OCR model with two modes, as such models have: it transcribes, unless the prompt asks for key information.

    It reads the images itself. Without images it works on the text block of the prompt.
    """

    def answer(self, messages: Sequence[Message]) -> str:
        """The most prominent text, or the value beside the key that the question names."""
        prompt, images = prompting.last_user(messages)
        page = [item for image in images for item in ENGINE.read(image)] or list(prompt.text or ())
        if not page:
            return prompting.UNKNOWN
        if re.search(r"\b(key|field)\b", prompt.instruction.lower()):
            return find_value(page, prompt.question) or find_value(page, prompt.focus) or prompting.UNKNOWN
        return max(page, key=lambda item: item.height).text


def find_value(page: Sequence[prompting.Item], question: str) -> str | None:
    """The text that belongs to the key named in the question: the rest of its box, or right of it, or below it."""
    scored = [(_key_score(item.text, question), item) for item in page[:_MOST_BOXES]]
    score, key = max(scored, key=lambda pair: pair[0], default=(0.0, None))
    if key is None or score < _SIMILAR:
        return None
    _, colon, rest = key.text.partition(":")
    if colon and rest.strip():
        return rest.strip()
    beside = _right_of(key, page) or _below(key, page)
    return None if beside is None else beside.text.strip(" :")


def _right_of(key: prompting.Item, page: Sequence[prompting.Item]) -> prompting.Item | None:
    same_row = [i for i in page if i.left >= key.right - 4 and abs(i.center[1] - key.center[1]) < 0.6 * key.height]
    return min(same_row, key=lambda item: item.left, default=None)


def _below(key: prompting.Item, page: Sequence[prompting.Item]) -> prompting.Item | None:
    under = [i for i in page if i.center[1] > key.bottom - 2 and i.left < key.right and i.right > key.left]
    nearest = min(under, key=lambda item: item.top, default=None)
    return nearest if nearest is not None and nearest.top - key.bottom < 1.5 * key.height else None


def _key_score(text: str, question: str) -> float:
    """How well a label (before any colon) is named by the question: 0 to 1, long labels first among equals."""
    label = plain(text.partition(":")[0])
    if not 2 <= len(label) <= _LONGEST_LABEL:
        return 0.0
    words = [plain(word) for word in question.split(maxsplit=_MOST_WORDS)[:_MOST_WORDS]]
    # The network drops spaces, so that a label may be two words of the question run together.
    spans = [word for word in words if word not in _TINY_WORDS] + [a + b for a, b in itertools.pairwise(words)]
    best = max((_likeness(label, span) for span in spans), default=0.0)
    return best + 0.001 * len(label) if best >= _SIMILAR else 0.0


def _likeness(label: str, span: str) -> float:
    """The ratio of difflib where it can reach `_SIMILAR`, else 0, which their lengths or letters say sooner."""
    if 2.0 * min(len(label), len(span)) < _SIMILAR * (len(label) + len(span)):
        return 0.0
    matcher = difflib.SequenceMatcher(None, label, span)
    return matcher.ratio() if matcher.quick_ratio() >= _SIMILAR else 0.0


def plain(text: str) -> str:
    """Lower-case letters and digits only, for comparing labels."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
