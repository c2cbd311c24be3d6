"""What an in-process specialist is handed: the last user message, read into fields and pixels.

In come the chat messages of a request. Out go a frozen `Prompt` (the blocks that a skill's
templates write, see `parse`) and RGB arrays. Nothing here raises on odd text or broken images,
because both are foreign: what cannot be read is empty.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from maestro_jax.registry.description.interface import Message

UNKNOWN = "I cannot tell."

_ITEM = re.compile(r"^(?P<text>.*) @ (?P<box>-?\d{1,9}(?:,-?\d{1,9}){3})$")
_HEADERS = ("text in the image:", "objects:", "caption:", "question:", "focus:")


@dataclasses.dataclass(frozen=True)
class Item:
    """One `text @ x0,y0,x1,y1` line: a text box or a detected object; pixels, right and bottom exclusive."""

    text: str
    left: int
    top: int
    right: int
    bottom: int

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def __str__(self) -> str:
        return f"{self.text} @ {self.left},{self.top},{self.right},{self.bottom}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The fields of a prompt; a block that the skill did not write is empty (`text`/`objects`: None, not ran)."""

    instruction: str = ""
    question: str = ""
    focus: str = ""
    caption: str = ""
    text: tuple[Item, ...] | None = None
    objects: tuple[Item, ...] | None = None

    @property
    def asked(self) -> str:
        """Question, or the focus when there is no question: what the specialist should answer."""
        return self.question or self.focus


def parse(prompt: str) -> Prompt:
    """Splits a prompt at its headers; what comes before the first header is the instruction."""
    blocks: dict[str, list[str]] = {"": []}
    current = ""
    for line in prompt.splitlines():
        header = next((h for h in _HEADERS if line.strip().lower().startswith(h)), None)
        if header is not None:
            current = header
            blocks[current] = []  # the last block of a name wins: templates put question and focus at the end
            line = line.strip()[len(header) :]
        blocks[current].append(line.strip())
    joined = {name: " ".join(filter(None, lines)) for name, lines in blocks.items()}
    return Prompt(
        instruction=joined[""],
        question=joined.get("question:", ""),
        focus=joined.get("focus:", ""),
        caption=joined.get("caption:", ""),
        text=read_items(blocks["text in the image:"]) if "text in the image:" in blocks else None,
        objects=read_items(blocks["objects:"]) if "objects:" in blocks else None,
    )


def read_items(lines: Iterable[str]) -> tuple[Item, ...]:
    """Reads `text @ x0,y0,x1,y1` lines; lines of another form are skipped."""
    matches = (_ITEM.match(line.strip()) for line in lines)
    return tuple(Item(m["text"], *map(int, m["box"].split(","))) for m in matches if m)


def write_items(items: Iterable[Item]) -> str:
    """The inverse of `read_items`: one line per item."""
    return "\n".join(str(item) for item in items)


def last_user(messages: Sequence[Message]) -> tuple[Prompt, tuple[bytes, ...]]:
    """The parsed prompt and the images of the last user message (empty when there is none)."""
    for message in reversed(messages):
        if message.role == "user":
            return parse(message.text), message.images
    return Prompt(), ()


def pixels(image: bytes) -> np.ndarray | None:
    """Decodes an encoded image to uint8 RGB [height, width, 3]; None when it cannot be decoded."""
    if not image:
        return None
    try:
        decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if decoded is None else cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def png(rgb: np.ndarray) -> bytes:
    """Encodes uint8 RGB [height, width, 3] as PNG."""
    return cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()
