"""The picture of an evaluation: accuracy of every benchmark with its interval, and of routing without learning."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maestro_jax.observe.drawing import BLUE, DPI, GREEN, GREY, ORANGE, caption, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {  # of baselines: marker, colour, words; beside each other, for they often have the same value
    "random": ("v", GREY, "random routing"),
    "best_single_pair": ("D", ORANGE, "best single pair"),
    "domain_oracle": ("s", GREEN, "best pair per benchmark"),
    "task_oracle": ("o", "black", "any pair right"),
}
_ROW = 0.42  # inches


def plot_accuracy(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws a bar for each benchmark and for their average; where tasks are missing, it says so and draws none.

    Args:
      summary: of `evaluation.report.summarise`.
      path: the PNG file to write.
    """
    missing = sum(row.get("missing", 0) for row in summary["benchmarks"].values())
    rows = {**summary["benchmarks"], "average": {**summary["average"], "missing": missing}}
    top, bottom = 1.15, 1.35
    height = top + _ROW * len(rows) + bottom
    figure = new_figure(9.5, height)
    left = 0.35 + 0.1 * max(len(_label(name, row)) for name, row in rows.items())
    axes = figure.add_axes((left / 9.5, bottom / height, (9.5 - left - 0.75) / 9.5, _ROW * len(rows) / height))
    _draw_bars(axes, rows)
    if not summary.get("baselines_missing"):
        _draw_baselines(axes, rows)
    figure.text(
        0.25 / 9.5, 1 - 0.4 / height, "How many questions does the policy answer right?", fontsize=15, weight="bold"
    )
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.15 / 9.5, 1 - 0.55 / height),
        ncols=4,
        frameon=False,
    )
    caption(
        figure,
        "Bars: share of held-out questions answered right, one greedy episode each; lines: 95 % bootstrap interval "
        "over questions. The average counts every benchmark alike. Markers, where measured: the same questions without "
        "a policy, each put to (expert, skill) pairs of the registry whose reply is the answer.",
        width=118,
    )
    figure.savefig(path, dpi=DPI)


def _label(name: str, row: Mapping[str, Any]) -> str:
    counts = [f"{row['tasks']}"] if "tasks" in row else []
    counts += [f"{row['missing']} not answered"] if row.get("missing") else []
    return f"{name} ({', '.join(counts)})" if counts else name


def _draw_bars(axes: "Axes", rows: Mapping[str, Mapping[str, Any]]) -> None:
    for at, (name, row) in enumerate(rows.items()):
        if row.get("missing"):
            axes.text(1.03, at, "-", va="center", fontsize=10)
            continue
        accuracy = row["accuracy"]
        axes.barh(at, accuracy["mean"], height=0.62, color=BLUE, alpha=1.0 if name == "average" else 0.72)
        axes.plot([accuracy["low"], accuracy["high"]], [at, at], color="black", linewidth=1.6)
        axes.text(1.03, at, f"{100 * accuracy['mean']:.1f}", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), [_label(name, row) for name, row in rows.items()], fontsize=10.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first one on top; rows without a bar have their place, too
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    finish(axes, grid="x")


def _draw_baselines(axes: "Axes", rows: Mapping[str, Mapping[str, Any]]) -> None:
    measured = [(at, row["baselines"]) for at, row in enumerate(rows.values()) if "baselines" in row]
    for beside, (name, (marker, colour, words)) in enumerate(_MARKS.items() if measured else ()):
        heights = [at + 0.16 * (beside - 1.5) for at, _ in measured]
        values = [baselines[name] for _, baselines in measured]
        axes.plot(
            values, heights, marker, color=colour, markersize=6, markeredgecolor="white", label=words, clip_on=False
        )
