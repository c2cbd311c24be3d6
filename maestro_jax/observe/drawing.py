"""What all figures share: colours, an empty page, a caption below."""

import textwrap
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
DPI = 150


def new_figure(width: float, height: float) -> "Figure":
    """A figure that draws without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def caption(figure: "Figure", text: str, width: int) -> None:
    inches_wide, inches_high = figure.get_size_inches()
    figure.text(
        0.25 / inches_wide, 0.15 / inches_high, textwrap.fill(text, width),
        fontsize=10, color="#444444", va="bottom", linespacing=1.35,
    )  # fmt: skip


def finish(axes: "Axes", grid: Literal["x", "y"] = "y") -> None:
    """Thin grid lines behind the data, no box around it."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
