"""The report of an evaluation: graded episodes in; a JSON-able summary, and the same as Markdown, out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from maestro_jax.evaluation.baselines import Baselines
from maestro_jax.evaluation.episodes import Episode, answered, by_source, routing_of
from maestro_jax.evaluation.settings import short
from maestro_jax.evaluation.statistics import bootstrap, majority, pass_at_k
from maestro_jax.rewards.graders import plain_name

# Average accuracy in percent, as reported by Maestro's authors (arXiv 2605.22177): theirs, not measured with this code.
REPORTED: dict[str, dict[str, float]] = {
    "ten benchmarks of the paper": {"Maestro-4B": 70.1, "GPT-5": 69.3, "Gemini-2.5-Pro": 68.7},
    "four out of domain": {"Maestro-4B": 59.5},
}
# What these averages are over.
REPORTED_SOURCES = {
    "ten benchmarks of the paper": (
        "ChartQA",
        "Geometry3K",
        "MicroVQA",
        "MSEarthMCQ",
        "SLAKE",
        "TallyQA",
        "HRBench-4K",
        "HRBench-8K",
        "VStar",
        "MathVision",
    ),
    "four out of domain": ("ERQA", "OCRBench", "VLMsAreBlind", "HumanEval-V"),
}
BAD_TURNS = ("malformed", "unresolved", "cut")
BASELINE_NAMES = {
    "random": "random routing",
    "best_single_pair": "best single pair",
    "domain_oracle": "best pair per benchmark",
    "task_oracle": "any pair right",
}


def summarise(
    greedy: Sequence[Episode], sampled: Sequence[Episode], baselines: Baselines | None, seed: int
) -> dict[str, Any]:
    """Everything measured, by benchmark (source) and on average over benchmarks.

    Args:
      greedy: an episode of every task; of each benchmark, one at least has an answer. Marked ones are missing: they
        count neither as right nor as wrong.
      sampled: as many of every task; none if nothing was sampled.
      seed: of the bootstrap.

    Returns:
      Shares in 0..1, US dollars, tokens, seconds. What a clock measured is under "latency", by benchmark.
    """
    sources, drawn = by_source(greedy), by_source(sampled)
    outcomes = {source: np.array([e.outcome for e in answered(own)]) for source, own in sources.items()}
    benchmarks = {source: _measured(own, outcomes[source], seed) for source, own in sources.items()}
    for source, own in drawn.items():
        benchmarks[source]["sampled"] = _sampled(own)
    for source in benchmarks if baselines else ():
        benchmarks[source]["baselines"] = {name: getattr(baselines, name)[source] for name in BASELINE_NAMES}
    return {
        "tasks": len(greedy),
        "baselines_missing": baselines.missing if baselines else 0,
        "missing": len(greedy) - len(answered(greedy)),
        "benchmarks": benchmarks,
        "average": _average(list(benchmarks.values()))
        | {"accuracy": bootstrap(list(outcomes.values()), seed)._asdict()},
        "latency": {source: _latency(own) for source, own in sources.items()},
        "reported": _reported(sources),
    }


def _measured(made: Sequence[Episode], outcomes: np.ndarray, seed: int) -> dict[str, Any]:
    episodes = answered(made)

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    counts = routing_of(episodes)[episodes[0].source]
    return {
        "tasks": len(made),
        "missing": len(made) - len(episodes),
        "accuracy": bootstrap([outcomes], seed)._asdict(),
        "kept_format": mean([e.kept_format for e in episodes]),
        "calls": mean([e.executed_calls for e in episodes]),
        **{name: mean([getattr(e, name) for e in episodes]) for name in BAD_TURNS},
        "tokens_written": mean([e.written for e in episodes]),
        "tokens_told": mean([e.told for e in episodes]),
        "price": mean([e.price for e in episodes]),
        "routing": [[*pair, n] for pair, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))],
    }


def _sampled(episodes: Sequence[Episode]) -> dict[str, Any]:
    """mean@k, pass@k and the majority's accuracy of one benchmark, of the tasks whose samples all have an answer."""
    drawn: dict[str, list[Episode]] = {}
    for episode in episodes:
        drawn.setdefault(episode.task, []).append(episode)
    tasks = {task: own for task, own in drawn.items() if not any(e.marked for e in own)}
    if not tasks:
        return {"samples": len(next(iter(drawn.values()))), "missing": len(drawn)}
    outcomes = np.array([[e.outcome for e in own] for own in tasks.values()])
    samples = outcomes.shape[1]
    votes = [majority([e.answer for e in own], [e.outcome for e in own]) for own in tasks.values()]
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return {
        "samples": samples,
        "missing": len(drawn) - len(tasks),
        "mean": float(outcomes.mean()),
        "pass": {str(k): pass_at_k(outcomes, k) for k in [*powers, samples]},
        "majority": float(np.mean(votes)),
    }


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over benchmarks of every number that all of them have; routing and counts of tasks have none."""
    found: dict[str, Any] = {}
    for key, value in rows[0].items():
        own = [row[key] for row in rows if key in row]
        if len(own) < len(rows) or key in ("tasks", "missing", "routing", "samples", "accuracy"):
            continue
        found[key] = _average(own) if isinstance(value, Mapping) else float(np.mean(own))
    return found


def _reported(sources: Iterable[str]) -> dict[str, dict[str, float]]:
    """The authors' averages over benchmarks that these are among."""
    found = set(map(plain_name, sources))
    return {group: REPORTED[group] for group, own in REPORTED_SOURCES.items() if found & set(map(plain_name, own))}


def _latency(episodes: Sequence[Episode]) -> dict[str, float]:
    """Seconds of calls that ran, and of whole episodes."""
    calls = [call.seconds for e in episodes for call in e.calls if call.status == "OK"] or [0.0]
    found = {"call": calls, "episode": [e.seconds for e in episodes]}
    return {f"{name}_p{q}": float(np.percentile(own, q)) for name, own in found.items() for q in (50, 95)}


# ---- Markdown ----------------------------------------------------------------------------------------------


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as tables: accuracy, what it took, who was called."""
    benchmarks: Mapping[str, Mapping[str, Any]] = summary["benchmarks"]
    rows = {**benchmarks, "average": summary["average"]}
    tasks, missing = summary["tasks"], summary["missing"]
    parts = ["# Evaluation", "", f"{tasks} tasks, one greedy episode each. {summary['policy']}.", ""]
    if missing:
        parts += [f"**{missing} of {tasks} not answered** (an expert failed): accuracy over {tasks - missing}.", ""]
    if sampled := sum(row.get("sampled", {}).get("missing", 0) for row in benchmarks.values()):
        parts += [
            f"**{sampled} of {tasks} tasks lack a sample's answer**: mean, pass and majority over the others.",
            "",
        ]
    if calls := summary["baselines_missing"]:
        parts += [f"**{calls} of the baselines' calls not answered**: their figures are over the others.", ""]
    if changed := summary.get("differences"):
        head = [["setting", "the run", "here"]]
        table = _table(head + [[key, short(each["run"]), short(each["here"])] for key, each in changed.items()])
        parts += ["## Settings that are not the run's", "", *table, ""]
    parts += ["## Accuracy (%)", "", *_accuracy_table(rows), ""]
    parts += [
        "In brackets: 95 % bootstrap interval over tasks. The average counts every benchmark alike. Tasks that are not "
        "answered (an expert failed or was late whenever it was asked) count neither as right nor as wrong.",
        "",
    ]
    parts += ["## What it took", "", *_effort_table(rows, summary["latency"]), ""]
    parts += [
        "A task's average. Malformed: turns without a well-formed call or an answer. Unresolved: calls of names that "
        "the registry does not show. Cut: turns that ended where the token budget did.",
        "",
    ]
    parts += ["## Who was called", "", *_routing_table(benchmarks), ""]
    if reported := summary["reported"]:
        parts += ["## Reported by the authors of Maestro (arXiv 2605.22177), not measured here", ""]
        parts += _table(
            [["average over", "model", "%"], *([a, m, f"{x}"] for a in reported for m, x in reported[a].items())]
        )
    return "\n".join(parts) + "\n"


def _accuracy_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    first = next(iter(rows.values()))
    drawn = [row["sampled"] for row in rows.values() if "mean" in row.get("sampled", {})]
    sampled = list(drawn[0]["pass"]) if drawn else []
    baselines = list(BASELINE_NAMES) if "baselines" in first else []
    head = ["benchmark", "tasks", "greedy", "format kept", "not answered"]
    if sampled:
        head += [f"mean@{sampled[-1]}", *(f"pass@{k}" for k in sampled[1:]), f"majority@{sampled[-1]}"]
    table = [head + [BASELINE_NAMES[name] for name in baselines]]
    for name, row in rows.items():
        accuracy = row["accuracy"]
        interval = f"{_percent(accuracy['mean'])} [{_percent(accuracy['low'])}, {_percent(accuracy['high'])}]"
        counted = [str(row.get(key, "")) for key in ("tasks", "missing")]
        cells = [name, counted[0], interval, _percent(row["kept_format"]), counted[1]]
        if sampled:
            own = row.get("sampled", {})
            found = [own["mean"], *(own["pass"][k] for k in sampled[1:]), own["majority"]] if "mean" in own else []
            cells += [_percent(share) for share in found] or ["-"] * (len(sampled) + 1)
        table.append(cells + [_percent(row["baselines"][name]) for name in baselines])
    return _table(table)


def _effort_table(rows: Mapping[str, Mapping[str, Any]], latency: Mapping[str, Mapping[str, float]]) -> list[str]:
    clock = ["call_p50", "call_p95", "episode_p50", "episode_p95"]
    head = ["benchmark", "calls", *BAD_TURNS, "tokens written", "tokens told", "US$ a task"]
    table = [head + [f"{name.replace('_', ' ')} (s)" for name in clock]]
    for name, row in rows.items():
        cells = [name, *(f"{row[key]:.2f}" for key in ("calls", *BAD_TURNS))]
        cells += [f"{row[key]:.0f}" for key in ("tokens_written", "tokens_told")]
        seconds = [f"{latency[name][key]:.2f}" for key in clock] if name in latency else [""] * len(clock)
        table.append([*cells, f"{row['price']:.6f}", *seconds])
    return _table(table)


def _routing_table(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    table = [["benchmark", "expert", "skill", "calls", "share (%)"]]
    for name, row in benchmarks.items():
        total = sum(n for _, _, n in row["routing"])
        table += [[name, expert, skill, str(n), _percent(n / total)] for expert, skill, n in row["routing"]]
    return _table(table)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
