"""The one interface every expert and every service implements (no jax in this room).

An expert is a frozen model: messages with images in, text out. Remote experts (HTTP) and
in-process specialists look the same from here: asynchronous, given the seconds that remain,
answering with a status instead of raising.
"""

import dataclasses
from typing import Protocol

from maestro_jax.registry.description.boxes import Box
from maestro_jax.types import Call, Observation, Status, Usage


@dataclasses.dataclass(frozen=True)
class Message:
    """One chat message; images are encoded bytes and come before the text."""

    role: str  # "system" | "user" | "assistant"
    text: str
    images: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Decoding settings asked of an expert."""

    temperature: float = 0.0
    max_tokens: int = 1024
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Request:
    """What an expert is asked.

    Attributes:
      messages: the conversation, oldest first.
      sampling: decoding settings; None leaves them to the expert. A deterministic expert may ignore them.
      deadline: seconds that remain for this request; the expert must answer (or give up with
        `Status.TIMEOUT`) within them.
    """

    messages: tuple[Message, ...]
    sampling: Sampling | None = None
    deadline: float = 60.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an expert answered. `text` is empty unless `status` is OK."""

    text: str
    status: Status
    usage: Usage = Usage()
    seconds: float = 0.0


class Expert(Protocol):
    """A frozen model behind one interface. Nothing here raises for a fault of the expert."""

    name: str

    async def ask(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class ServiceResult:
    """What a service produced: text for a prompt, images or boxes for the stages after it, and what that cost."""

    text: str = ""
    images: tuple[bytes, ...] = ()
    status: Status = Status.OK
    seconds: float = 0.0
    boxes: tuple[Box, ...] = ()  # in the images it was given
    usage: Usage = Usage()


class Service(Protocol):
    """A helper of skills (OCR, detection, captioning, zoom, code sandbox)."""

    name: str

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult: ...

    async def close(self) -> None: ...


class CallRunner(Protocol):
    """What the dispatcher needs of a registry."""

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation: ...

    def shunned(self) -> dict[str, str]: ...

    async def close(self) -> None: ...
