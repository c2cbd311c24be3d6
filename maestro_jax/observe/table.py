"""The closing table of a run: the summary comes in, plain text for a terminal goes out."""

import io
from collections.abc import Mapping
from typing import Any

# Keys of `summary["accuracy"]`, in the order of what they show, with the words a newcomer understands.
ROWS = (
    ("random", "random routing"),
    ("best_single_pair", "best single pair"),
    ("warm_start", "warm start (before RL)"),
    ("trained", "trained (after RL)"),
    ("domain_oracle", "domain oracle"),
    ("task_oracle", "task oracle"),
)
WIDTH = 100
_DOMAINS = 5  # side by side


def summary_table(summary: Mapping[str, Any]) -> str:
    """Accuracy on held-out tasks, overall and per domain, for the policy and its baselines.

    Args:
      summary: `accuracy` {row: share}, `accuracy_by_domain` {row: {domain: share}} (may be
        missing), `steps`, `wall_seconds`, `seed`, and `held_out_tasks`, `missing`, `skipped_updates` and `marked`
        (may be missing).

    Returns:
      A Markdown table in lines of at most 100 columns; domains that do not fit continue in a further one.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    by_domain: Mapping[str, Mapping[str, float]] = summary.get("accuracy_by_domain", {})
    domains = list(dict.fromkeys(domain for shares in by_domain.values() for domain in shares))
    tasks = f" on {summary['held_out_tasks']} held-out tasks" if "held_out_tasks" in summary else ""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    with console.capture() as written:
        console.print(f"Accuracy (%){tasks}, greedy decoding", highlight=False)
        for at in range(0, max(1, len(domains)), _DOMAINS):
            block = domains[at : at + _DOMAINS]
            table = Table(box=box.MARKDOWN)
            table.add_column(no_wrap=True)
            for name in ("overall", *block):
                table.add_column(Text(name), justify="right", overflow="fold")
            for key, label in ROWS:
                if key in summary["accuracy"]:
                    shares = [summary["accuracy"][key], *(by_domain.get(key, {}).get(domain) for domain in block)]
                    table.add_row(label, *map(_percent, shares))
            console.print(table)  # lines of white space around it
    return written.get() + "\n".join(_notes(summary))


def _notes(summary: Mapping[str, Any]) -> list[str]:
    accuracy = summary["accuracy"]
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    lines = [f"{summary['steps']} steps, {minutes} min {seconds:02d} s, seed {summary['seed']}"]
    if "trained" in accuracy and "warm_start" in accuracy:
        gain = 100 * (accuracy["trained"] - accuracy["warm_start"])
        lines.append(f"reinforcement learning gained {gain:+.1f} points over the warm start")
    if "trained" in accuracy and accuracy.get("domain_oracle"):
        share = accuracy["trained"] / accuracy["domain_oracle"]
        lines.append(f"trained policy reaches {share:.2f} of the domain oracle")
    lines += gaps(summary)
    if "best_single_pair" in accuracy:
        lines.append("pair = (expert, skill); best single pair = the one that is best for all tasks together;")
        lines.append("domain oracle = the best pair of each domain; task oracle = a task counts when any pair is right")
    return lines


def whole_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The accuracies for which every task had an answer; others are no results to draw or to publish."""
    missing = summary.get("missing", {})
    of_a_policy = ("warm_start", "trained")
    return {
        name: value
        for name, value in summary["accuracy"].items()
        if not missing.get(name if name in of_a_policy else "baselines")
    }


def gaps(summary: Mapping[str, Any]) -> list[str]:
    """What the figures do not count, and how much of the training experts failed; nothing where all is well."""
    missing, tasks = summary.get("missing", {}), summary.get("held_out_tasks", 0)
    lines = [
        f"{dict(ROWS)[row]}: {missing[row]} of {tasks} tasks not answered; accuracy over the others"
        for row in ("warm_start", "trained")
        if missing.get(row)
    ]
    if missing.get("baselines"):
        lines.append(f"baselines: {missing['baselines']} calls not answered; accuracy over the others")
    if skipped := summary.get("skipped_updates"):
        lines.append(f"{skipped} of {summary['steps']} updates were skipped: their loss or gradient was not finite")
    for expert, share in summary.get("marked", {}).items():
        lines.append(f"{expert} failed {_percent(share)} % of the training episodes at first")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
