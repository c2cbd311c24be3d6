"""Live progress of a run: phases and figures come in, a moving display or plain lines go out.

On a terminal the current phase is redrawn in place (bar, figures, a small curve); elsewhere (log
files, CI, Slurm) each update is one plain ASCII line.
"""

import collections
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

Figure = float | int | str | None

_BLOCKS = "▁▂▃▄▅▆▇█"
_RECENT = 20  # steps that the estimate of time left looks back on: the first ones compile
_CURVE = 40  # points of the small curve
_BAR = 28


class Progress:
    """Shows where a run is.

    ```
    with Progress() as progress:
        progress.phase("train", total=100)
        for step in range(100):
            progress.update(step + 1, {"reward": 0.5, "accuracy": 0.6})
    ```

    Args:
      stream: where to write; standard output by default.
      terminal: whether to draw a live display; by default whether `stream` is a terminal.
      curve: the figure whose course is drawn on a terminal, when a phase has it.
      quiet: writes nothing, where another process does.
    """

    def __init__(
        self, stream: IO[str] | None = None, terminal: bool | None = None, curve: str = "reward", quiet: bool = False
    ):
        self._quiet = quiet
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty() if terminal is None else terminal
        self._curve = curve
        self._live: Any = None
        self._name = ""
        self._total = 0
        self._done = 0
        self._began = 0.0
        self._figures: dict[str, Figure] = {}
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=_RECENT + 1)
        self._course: list[float] = []

    def __enter__(self) -> "Progress":
        if self._terminal and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_phase()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begins a phase ("suite", "warm start", "evaluate", "train") and ends the one before.

        Args:
          name: shown in front of every line.
          total: how many steps it has.
          done: how many of them an earlier run did (resume).
        """
        self._end_phase()
        self._total, self._done = total, done
        self._began = time.monotonic()
        self._figures = {}
        self._course = []
        self._marks.clear()
        self._marks.append((self._began, done))
        self._name = name  # last: from here on the live display's thread draws the phase

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Notes that `done` steps of the phase are behind us; one plain line when not on a terminal."""
        self.tick(done)
        self._figures = dict(figures or {})
        value = self._figures.get(self._curve)
        if isinstance(value, (int, float)):
            self._course = [*self._course, float(value)][-_CURVE:]
        if self._live is None:
            self._print(self._line())

    def tick(self, done: int) -> None:
        """Moves the bar only: for work in small pieces that deserve no line of their own."""
        self._done = done
        # Marks are spread over the phase, so that many small ticks do not make the estimate jumpy.
        if done - self._marks[-1][1] >= max(1, self._total // 100):
            self._marks.append((time.monotonic(), done))

    def note(self, text: str) -> None:
        """One line that stays: what was found, loaded, saved."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _end_phase(self) -> None:
        if not self._name:
            return
        name, seconds = self._name, time.monotonic() - self._began
        self._name = ""  # the live display stops drawing it; the line below stays instead
        figures = "".join(f"  {text}" for text in _texts(self._figures))
        self.note(f"{name}: {self._done}/{self._total} in {_duration(seconds)}{figures if self._terminal else ''}")

    def _line(self) -> str:
        width = len(str(self._total))
        parts = [f"{self._name} {self._done:>{width}}/{self._total}", *_texts(self._figures)]
        left = self._seconds_left()
        if left is not None and self._done < self._total:
            parts.append(f"left {_duration(left)}")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        if end <= begin or last <= first:
            return None
        return (self._total - self._done) * (last - first) / (end - begin)

    def _render(self) -> Any:
        """The live display: a bar with step and time, then figures, then the small curve."""
        from rich.table import Table
        from rich.text import Text

        if not self._name:
            return Text("")
        grid = Table.grid(padding=(0, 1))
        filled = round(_BAR * self._done / max(self._total, 1))
        bar = Text("━" * filled, style="green") + Text("━" * (_BAR - filled), style="bright_black")
        left = self._seconds_left()
        times = f"{_duration(time.monotonic() - self._began)} elapsed"
        if left is not None and self._done < self._total:
            times += f", {_duration(left)} left"
        grid.add_row(Text(self._name, style="bold"), bar, f"{self._done}/{self._total}", Text(times, style="dim"))
        block = Table.grid()
        block.add_row(grid)
        if self._figures:
            block.add_row(Text("  " + " · ".join(_texts(self._figures))))
        if len(self._course) > 1:
            block.add_row(Text(f"  {self._curve} ") + Text(_sparkline(self._course), style="cyan"))
        return block

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        self._stream.write(text + "\n")
        self._stream.flush()


def _texts(figures: Mapping[str, Figure]) -> list[str]:
    """ "name value" of every figure that has a value."""
    return [f"{name} {_number(value)}" for name, value in figures.items() if value is not None]


def _number(value: Figure) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)
