"""Live progress of a run: phases and figures come in, a moving display or plain lines go out.

On a terminal the current phase is redrawn in place (rich's bar, figures, a small curve); elsewhere (log
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
_RECENT = 3600.0  # seconds that the estimate of time left looks back on: a step may take many minutes
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
        self._bar: Any = None  # of the phase: rich's `Progress` with one task, which keeps time for plain lines, too
        self._figures: dict[str, Figure] = {}
        self._course: collections.deque[float] = collections.deque(maxlen=_CURVE)

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
        from rich import progress as rich

        self._end_phase()
        self._figures = {}
        self._course.clear()
        bar = rich.Progress(
            rich.TextColumn("{task.description}", style="bold", markup=False),
            rich.BarColumn(_BAR),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left", style="dim"),
            rich.TimeRemainingColumn(),
            auto_refresh=False,
            speed_estimate_period=_RECENT,
            get_time=time.monotonic,
        )
        bar.add_task(name, total=total, completed=done)
        self._bar = bar  # last: from here on the live display's thread draws the phase

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Notes that `done` steps of the phase are behind us; one plain line when not on a terminal."""
        self.tick(done)
        self._figures = dict(figures or {})
        value = self._figures.get(self._curve)
        if isinstance(value, (int, float)):
            self._course.append(float(value))
        if self._live is None:
            task = self._bar.tasks[0]
            parts = [f"{task.description} {done:>{len(str(task.total))}}/{task.total}", *_texts(self._figures)]
            if task.time_remaining:
                parts.append(f"left {_duration(task.time_remaining)}")
            self._print("  ".join(parts))

    def tick(self, done: int) -> None:
        """Moves the bar only: for work in small pieces that deserve no line of their own."""
        self._bar.update(self._bar.task_ids[0], completed=done)

    def note(self, text: str) -> None:
        """One line that stays: what was found, loaded, saved."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _end_phase(self) -> None:
        if self._bar is None:
            return
        task = self._bar.tasks[0]
        self._bar = None  # the live display stops drawing it; the line below stays instead
        figures = "".join(f"  {text}" for text in _texts(self._figures)) if self._terminal else ""
        self.note(f"{task.description}: {task.completed}/{task.total} in {_duration(task.elapsed)}{figures}")

    def _render(self) -> Any:
        """The live display: a bar with step and time, then figures, then the small curve."""
        from rich.console import Group
        from rich.text import Text

        lines: list[Any] = [bar] if (bar := self._bar) else []
        if bar and self._figures:
            lines.append(Text("  " + " · ".join(_texts(self._figures))))
        if bar and len(self._course) > 1:
            lines.append(Text(f"  {self._curve} ").append(_sparkline(list(self._course)), style="cyan"))
        return Group(*lines)

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
