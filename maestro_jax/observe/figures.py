"""Figures of a run: metrics rows and routing counts come in, PNG files go out.

Both are drawn for somebody who has never seen the project: titles say what was learned, axes say
what is counted, and a caption below explains the words.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_jax.observe.drawing import BLUE, DPI, GREEN, GREY, ORANGE, caption, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pair = tuple[str, str]  # (expert, skill)
Routing = Mapping[str, Mapping[Pair, float]]  # domain -> pair -> number of calls (or accuracy)

BASELINES = {
    "random": "random routing",
    "best_single_pair": "best single pair",
    "warm_start": "warm start (before RL)",
    "trained": "trained",
    "domain_oracle": "best pair per domain",
    "task_oracle": "any pair right",
}
_MAP = "Blues"


def plot_curves(
    metrics_rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], path: str | os.PathLike[str]
) -> None:
    """Draws accuracy (above) and reward (below) over training steps.

    Args:
      metrics_rows: rows with "step" and any of "reward", "accuracy" (training batches) and
        "held_out_accuracy"; null or missing values are left out.
      baselines: accuracy of routing without learning, drawn as dashed lines: keys of `BASELINES`
        get readable names, others stand for themselves.
      path: the PNG file to write.
    """
    figure = new_figure(9.8, 7.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.subplots_adjust(left=0.105, right=0.765, top=0.885, bottom=0.21, hspace=0.12)
    figure.text(0.025, 0.96, "Learning which expert and skill to call", fontsize=15, weight="bold")
    _draw_accuracy(above, metrics_rows, baselines)
    _draw_reward(below, metrics_rows)
    caption(
        figure,
        "A policy answers questions about images by calling frozen experts through skills; only the policy is trained. "
        "Thin lines: each step's batch of training questions, answers sampled. Thick: running mean. Squares: questions "
        "held out of training, answers greedy. Dashed: accuracy on the same held-out questions without learning: one "
        "(expert, skill) pair drawn at random for each, one fixed pair for all, the policy before reinforcement "
        "learning (RL), the best pair of each domain, or whichever pair happens to be right.",
        width=128,
    )
    figure.savefig(path, dpi=DPI)


def _draw_accuracy(axes: "Axes", rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> None:
    _draw_noisy(axes, *_series(rows, "accuracy"), color=BLUE, label="training questions, sampled")
    steps, values = _series(rows, "held_out_accuracy")
    if steps:
        # not clipped: the first square often lies on the axis
        style: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "zorder": 4, "clip_on": False}
        axes.plot(steps, values, "s-", color=ORANGE, label="held-out questions, greedy", **style)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel("accuracy\n(share of questions right)")
    _draw_baselines(axes, baselines)
    finish(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False)


def _draw_baselines(axes: "Axes", baselines: Mapping[str, float]) -> None:
    """Dashed lines with their names to the right, moved apart where they would overlap."""
    ordered = sorted(baselines.items(), key=lambda item: item[1])
    heights = _spread([value for _, value in ordered], gap=0.062, top=1.0)
    leader = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
    for (name, value), height in zip(ordered, heights, strict=True):
        axes.axhline(value, color=GREY, linestyle=(0, (5, 3)), linewidth=1.1, zorder=1)
        axes.annotate(
            f"{BASELINES.get(name, name)}: {100 * value:.0f} %",
            xy=(1, value),
            xytext=(1.025, height),
            xycoords=("axes fraction", "data"),
            fontsize=10,
            color="#333333",
            va="center",
            annotation_clip=False,
            arrowprops=leader,
        )


def _draw_reward(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = _series(rows, "reward")
    _draw_noisy(axes, steps, values, color=GREEN, label="training questions, sampled")
    axes.set_ylabel("mean reward\n(1 = right, well-formed)")
    axes.set_ylim(min([0.0, *values]) - 0.02, 1.02)  # the same scale in every run
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step")
    finish(axes)


def _draw_noisy(axes: "Axes", steps: list[int], values: list[float], color: str, label: str) -> None:
    """A thin line of what was measured under a thick running mean."""
    if not steps:
        return
    axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.4)
    dot = "o" if len(steps) == 1 else ""  # a line of one point would be invisible
    axes.plot(steps, _running_mean(values), color=color, linewidth=2.4, marker=dot, label=label, zorder=3)


def _running_mean(values: list[float]) -> np.ndarray:
    """Centred mean over about a tenth of the run, over fewer points at the ends."""
    half = max(1, len(values) // 20)
    padded = np.asarray(values, dtype=np.float64)
    return np.array([padded[max(0, at - half) : at + half + 1].mean() for at in range(len(values))])


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _spread(values: list[float], gap: float, top: float) -> list[float]:
    """Heights near sorted `values`, at least `gap` apart and not above `top`."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] + gap) if heights else value)
    ceiling = top
    for at in reversed(range(len(heights))):
        heights[at] = min(heights[at], ceiling)
        ceiling = heights[at] - gap
    return heights


def plot_routing(panels: Mapping[str, Routing], path: str | os.PathLike[str], accuracy: Routing | None = None) -> None:
    """Draws which pair a policy calls in each domain, one panel a policy, side by side.

    Domains are columns and pairs are rows, grouped by expert: so all names read horizontally.

    Args:
      panels: title -> domain -> (expert, skill) -> number of calls.
      path: the PNG file to write.
      accuracy: domain -> (expert, skill) -> share right when that pair answers; when given, the
        best pair of each domain is outlined (several when they tie).
    """
    domains = list(dict.fromkeys(domain for routing in panels.values() for domain in routing))
    pairs = _pairs([*panels.values(), accuracy or {}]) or [("no call", "at all")]
    figure, drawn = _routing_panels(domains, pairs, len(panels))
    best = {domain: _best_pairs((accuracy or {}).get(domain, {})) for domain in domains}
    for axes, (title, routing) in zip(drawn, panels.items(), strict=True):
        _draw_routing(axes, _shares(routing, domains, pairs), best, domains, pairs)
        share = _share_of_best(routing, best)
        told = "" if share is None else f"\n{100 * share:.0f} % of the calls go to a best pair"
        axes.set_title(title + told, fontsize=13, pad=12)
    _name_rows(drawn[0], pairs)
    _routing_margins(figure, drawn, outlined=bool(accuracy))
    figure.savefig(path, dpi=DPI)


# Inches round and in the routing figure.
_MARGIN, _BETWEEN, _RIGHT, _BOTTOM, _LEAST_WIDTH = 0.25, 0.45, 1.25, 1.4, 9.5


def _routing_panels(domains: list[str], pairs: list[Pair], count: int) -> tuple["Figure", list["Axes"]]:
    """Empty panels in a figure that leaves room for every name."""
    wide, high = max(len(domains) * 0.82, 3.6), max(len(pairs) * 0.29, 1.6)
    left = _MARGIN + _expert_width(pairs) + _skill_width(pairs)
    top = 2.2 if _tilted(domains) else 1.7
    width, height = max(left + count * (wide + _BETWEEN) - _BETWEEN + _RIGHT, _LEAST_WIDTH), top + high + _BOTTOM
    figure = new_figure(width, height)
    lefts = [left + at * (wide + _BETWEEN) for at in range(count)]
    panels = [figure.add_axes((at / width, _BOTTOM / height, wide / width, high / height)) for at in lefts]
    return figure, panels


def _expert_width(pairs: list[Pair]) -> float:
    return max(0.7, 0.125 * max(len(expert) for expert, _ in pairs)) + 0.2


def _skill_width(pairs: list[Pair]) -> float:
    return max(0.5, 0.085 * max(len(skill) for _, skill in pairs)) + 0.1


def _tilted(domains: list[str]) -> bool:
    return len(domains) > 8 or any(len(domain) > 11 for domain in domains)


def _pairs(routings: Sequence[Routing]) -> list[Pair]:
    """Every pair that occurs, experts and skills each in the order they are first met."""
    met = list(dict.fromkeys(pair for routing in routings for counts in routing.values() for pair in counts))
    experts = list(dict.fromkeys(expert for expert, _ in met))
    skills = list(dict.fromkeys(skill for _, skill in met))
    return sorted(met, key=lambda pair: (experts.index(pair[0]), skills.index(pair[1])))


def _shares(routing: Routing, domains: list[str], pairs: list[Pair]) -> np.ndarray:
    """float [pairs, domains]: share of a domain's calls; NaN where a domain has no call."""
    counts = np.array([[float(routing.get(domain, {}).get(pair, 0)) for domain in domains] for pair in pairs])
    totals = counts.sum(axis=0)
    return counts / np.where(totals > 0, totals, np.nan)


def _best_pairs(accuracy: Mapping[Pair, float]) -> set[Pair]:
    highest = max(accuracy.values(), default=0.0)
    return {pair for pair, share in accuracy.items() if share == highest > 0}


def _share_of_best(routing: Routing, best: Mapping[str, set[Pair]]) -> float | None:
    calls = [(count, pair in best[domain]) for domain, counts in routing.items() for pair, count in counts.items()]
    total = sum(count for count, _ in calls)
    if not any(best.values()) or not total:
        return None
    return sum(count for count, is_best in calls if is_best) / total


def _draw_routing(
    axes: "Axes", shares: np.ndarray, best: Mapping[str, set[Pair]], domains: list[str], pairs: list[Pair]
) -> None:
    from matplotlib import colormaps

    axes.imshow(shares, cmap=colormaps[_MAP].with_extremes(bad="#dddddd"), vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        is_best = pairs[row] in best[domains[column]]
        if share >= 0.005 or is_best:
            _number_cell(axes, row, column, share)
        if is_best:
            _outline_cell(axes, row, column)
    slant: dict[str, Any] = {"rotation": 45, "ha": "left"} if _tilted(domains) else {}
    axes.set_xticks(range(len(domains)), domains, fontsize=11, **slant)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(length=0)
    # Thin white lines between cells, dark ones between experts.
    for column in range(1, len(domains)):
        axes.axvline(column - 0.5, color="white", linewidth=1.5)
    for row in range(1, len(pairs)):
        new_expert = pairs[row][0] != pairs[row - 1][0]
        axes.axhline(row - 0.5, color="#333333" if new_expert else "white", linewidth=1.4 if new_expert else 0.8)


def _number_cell(axes: "Axes", row: int, column: int, share: float) -> None:
    text = "–" if np.isnan(share) else f"{100 * share:.0f} %"
    axes.text(
        column, row, text, ha="center", va="center", fontsize=9.5, color="white" if share > 0.5 else "#222222"
    )  # fmt: skip


def _outline_cell(axes: "Axes", row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.47, row - 0.45)
    axes.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, edgecolor=ORANGE, linewidth=2.4, zorder=5))


def _name_rows(axes: "Axes", pairs: list[Pair]) -> None:
    """Skill names beside the rows, expert names before them, once per group, with a rule between groups."""
    axes.set_yticks(range(len(pairs)), [skill.replace("_", " ") for _, skill in pairs], fontsize=10.5)
    inch = 1 / (axes.get_position().width * axes.figure.get_figwidth())  # type: ignore[union-attr]
    edge = -(_expert_width(pairs) + _skill_width(pairs)) * inch
    beside = axes.get_yaxis_transform()
    for expert in dict.fromkeys(expert for expert, _ in pairs):
        rows = [row for row, pair in enumerate(pairs) if pair[0] == expert]
        middle = (rows[0] + rows[-1]) / 2
        axes.text(edge, middle, expert, transform=beside, fontsize=12, weight="bold", va="center", clip_on=False)
        if rows[0]:
            line = [rows[0] - 0.5] * 2
            axes.plot([edge, 0], line, transform=beside, color="#333333", linewidth=1.4, clip_on=False)
    for text, at in (("expert", edge), ("skill", -_skill_width(pairs) * inch)):
        axes.text(at, -0.75, text, transform=beside, fontsize=11, style="italic", color=GREY, va="center")


def _routing_margins(figure: "Figure", panels: list["Axes"], outlined: bool) -> None:
    """Title, colour scale, legend and caption."""
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    figure.text(
        0.25 / width, 1 - 0.42 / height, "Which expert and skill does the policy call in each domain?",
        fontsize=16, weight="bold", va="center",
    )  # fmt: skip
    box = panels[-1].get_position()
    scale = figure.add_axes((box.x1 + 0.25 / width, box.y0, 0.17 / width, box.height))
    bar = figure.colorbar(panels[-1].images[0], cax=scale, format=lambda value, _: f"{100 * value:.0f} %")
    bar.set_label("share of the domain's calls", fontsize=11)
    bar.outline.set_visible(False)
    if outlined:
        handle = Patch(fill=False, edgecolor=ORANGE, linewidth=2.4)
        figure.legend(
            [handle], ["best pair of the domain: answers most of its held-out questions when always called"],
            loc="lower left", bbox_to_anchor=(0.2 / width, (_BOTTOM - 0.47) / height), frameon=False, fontsize=11,
        )  # fmt: skip
    caption(
        figure,
        "Each row is a pair: a frozen expert model, called through a skill (a fixed pipeline of stages). Columns are "
        "the domains of the questions. Each column adds up to 100 % of the policy's calls in that domain; shares below "
        "0.5 % have no number, a grey column means no call. Held-out questions, answered greedily. "
        "Nobody tells the policy which pair is right: it learns from whether its final answers were correct.",
        width=round(width * 12.3),
    )
