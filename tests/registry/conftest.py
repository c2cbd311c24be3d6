"""A small registry of fake specialists, installed as an importable module for the time of a test."""

import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from maestro_jax.registry.description.interface import Message


class Echo:
    """Answers with its mark and the last line it was asked; counts how often."""

    asked = 0

    def __init__(self, mark: str = "echo"):
        self.mark = mark

    def answer(self, messages: Sequence[Message]) -> str:
        type(self).asked += 1
        return f"{self.mark} {messages[-1].text.splitlines()[-1]} {len(messages[-1].images)}"


class Crash:
    def answer(self, messages: Sequence[Message]) -> str:
        raise StopIteration("secret detail")


class NotText:
    def answer(self, messages: Sequence[Message]) -> Any:
        return 42


class Hang:
    """Blocks until the test ends."""

    released = threading.Event()

    def answer(self, messages: Sequence[Message]) -> str:
        self.released.wait()
        return "too late"


class Words:
    """A service that says how many images it saw and returns them twice."""

    ran = 0

    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        type(self).ran += 1
        return f"words of {len(images)} {text}".strip(), images * 2


class BrokenService:
    def run(self, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
        raise OSError("no network file")


@pytest.fixture(autouse=True)
def specialists(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType("fake_specialists")
    for cls in (Echo, Crash, NotText, Hang, Words, BrokenService):
        setattr(module, cls.__name__, cls)
    module.not_a_class = "text"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_specialists", module)
    Echo.asked, Words.ran = 0, 0
    Hang.released.clear()
    yield module
    Hang.released.set()


def expert(name: str = "Echo-One", cls: str = "Echo", **fields: Any) -> dict[str, Any]:
    return {"name": name, "description": "says it again", "implementation": f"fake_specialists:{cls}", **fields}


def ask(prompt: str = "Question: {question}\nFocus: {query}", **fields: Any) -> dict[str, Any]:
    return {"kind": "ask", "output": "answer", "images": "task", "prompt": prompt, **fields}


@pytest.fixture
def raw() -> Callable[..., dict[str, Any]]:
    """Builds a valid raw registry; keyword arguments replace whole parts."""

    def build(**parts: Any) -> dict[str, Any]:
        plain = {
            "experts": (expert(price_prompt=1.0, price_completion=2.0), expert("Echo-Two", options={"mark": "two"})),
            "services": ({"name": "ocr", "implementation": "fake_specialists:Words"},),
            "skills": (
                {"name": "Plain_Solver", "description": "asks once", "stages": (ask(),)},
                {
                    "name": "Text_Solver",
                    "description": "reads, then asks",
                    "stages": (
                        {"kind": "service", "service": "ocr", "output": "ocr", "images": "task"},
                        ask("{ocr}; {question}", images="ocr"),
                    ),
                },
            ),
        }
        return plain | parts

    return build
