"""Progress for programs: a callback in place of a terminal."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from maestro_jax.observe.progress import Figure, Progress
from maestro_jax.parallel import cluster


@dataclasses.dataclass(frozen=True)
class Event:
    """Where a run is, or a line that it says.

    Attributes:
      phase: such as "warm start" or "train"; empty before the first.
      done, total: steps of the phase.
      figures: of its last update, such as "reward".
      note: what was found, loaded or saved; empty unless this is what the event is for.
    """

    phase: str
    done: int
    total: int
    figures: Mapping[str, Figure]
    note: str = ""


Show = Literal["terminal"] | Callable[[Event], None] | None  # where progress goes


class Listening(Progress):
    """Progress that a callback hears."""

    def __init__(self, hear: Callable[[Event], None]):
        super().__init__(quiet=True)
        self._hear = hear
        self._event = Event("", 0, 0, {})

    def phase(self, name: str, total: int, done: int = 0) -> None:
        super().phase(name, total, done)
        self._event = Event(name, done, total, {})
        self._hear(self._event)

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        self._event = dataclasses.replace(self._event, figures=dict(figures or {}))
        super().update(done, figures)  # which ticks

    def tick(self, done: int) -> None:
        super().tick(done)
        self._event = dataclasses.replace(self._event, done=done)
        self._hear(self._event)

    def note(self, text: str) -> None:
        super().note(text)
        self._hear(dataclasses.replace(self._event, note=text))


@contextlib.contextmanager
def showing(show: Show, curve: str = "reward") -> Iterator[Progress]:
    """The progress of a function that takes `progress`; process 0 shows it for all."""
    if callable(show) and cluster.is_main():
        made: Progress = Listening(show)
    else:
        made = Progress(curve=curve, quiet=show is None or not cluster.is_main())
    with made as progress:
        yield progress
