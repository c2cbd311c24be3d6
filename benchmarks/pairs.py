"""Two sides timed in turns: what every benchmark does with its seconds.

In: two callables that run one side once and return seconds by measure. Out: pairs (ours, theirs), their median
ratio, a table on standard output and, with --json, a file. A ratio is their seconds over ours: above 1 we are faster.
"""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import torch
from absl import flags

from maestro_jax.errors import UserError
from maestro_jax.observe.files import write_json
from maestro_jax.observe.progress import Progress

JSON = flags.DEFINE_string("json", "", "File to write the results to, besides the table.")
PAIRS = flags.DEFINE_integer("pairs", 7, "How often each side is timed.", lower_bound=1)
SMOKE = flags.DEFINE_bool("smoke", False, "A toy shape: shows that the program runs; its times mean nothing.")

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")

Pair = tuple[float, float]  # seconds: ours, theirs


class MismatchError(UserError):
    """The two sides do not compute the same, so their times say nothing."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One measure: what its seconds hold on either side, and the timed pairs."""

    ours: str
    theirs: str
    pairs: Sequence[Pair]
    details: Mapping[str, Any]  # further keys of the JSON entry: compile and warm-up seconds, gaps, shapes

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in self.pairs]

    @property
    def ratio(self) -> float:
        """The median over pairs of their seconds by ours."""
        return statistics.median(self.ratios)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measure that is no ratio of seconds."""

    what: str
    value: float
    unit: str
    reach: float  # the most that it should be
    details: Mapping[str, Any]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result (which must be ready when the call returns)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def interleave(
    ours: Callable[[], Mapping[str, float]],
    theirs: Callable[[], Mapping[str, float]],
    count: int,
    name: str,
    progress: Progress,
) -> dict[str, list[Pair]]:
    """Runs both sides in turns, `count` times each.

    Every second pair runs in the other order, so that a machine growing faster or slower favours nobody.

    Returns:
      Pairs by measure; both sides return the same measures.
    """
    pairs: dict[str, list[Pair]] = {}
    progress.phase(name, count)
    for number in range(count):
        if number % 2 == 0:
            own, other = ours(), theirs()
        else:
            other, own = theirs(), ours()
        for measure in own:
            pairs.setdefault(measure, []).append((own[measure], other[measure]))
        progress.update(number + 1, {f"{measure} ratio": other[measure] / own[measure] for measure in own})
    return pairs


# ---- results ------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Result | Figure]) -> None:
    """Prints the table, and writes the JSON file if one was asked for."""
    print("\n".join(table(results, machine())))
    keep(results)


def keep(results: Mapping[str, Result | Figure]) -> None:
    """Writes the JSON file, if one was asked for, with what has been measured so far."""
    here = machine()
    if JSON.value:
        write_json(JSON.value, {name: entry(result) | here for name, result in results.items()})


def entry(result: Result | Figure) -> dict[str, Any]:
    """A result as JSON, without the machine."""
    if isinstance(result, Figure):
        found = {"value": result.value, "unit": result.unit, "reach": result.reach, "what": result.what}
        return found | dict(result.details)
    return {
        "ratio": result.ratio,
        "ratio_range": [min(result.ratios), max(result.ratios)],
        "pairs": [list(pair) for pair in result.pairs],
        "pair": "seconds [ours, theirs]",
        "ours": result.ours,
        "theirs": result.theirs,
        **result.details,
    }


def table(results: Mapping[str, Result | Figure], here: Mapping[str, Any]) -> list[str]:
    """Lines: medians of seconds and ratios, figures, what they hold, the machine."""
    lines = []
    ratios = {name: result for name, result in results.items() if isinstance(result, Result)}
    if ratios:
        lines += [f"{'':<16}{'ours (s)':>10}{'theirs (s)':>12}{'ratio':>8}  {'least-most':<12}", "-" * 60]
    for name, timed_pairs in ratios.items():
        ours, theirs = (statistics.median(side) for side in zip(*timed_pairs.pairs, strict=True))
        spread = f"{min(timed_pairs.ratios):.2f}-{max(timed_pairs.ratios):.2f}"
        lines.append(f"{name:<16}{ours:>10.4g}{theirs:>12.4g}{timed_pairs.ratio:>8.2f}  {spread:<12}")
    if ratios:
        lines += ["-" * 60, "medians; ratio = their seconds / ours, above 1 we are faster"]
    before: Mapping[str, Any] = {}
    for name, result in results.items():
        lines += ["", *_explained(name, result)]
        # Measures of one run share their details.
        lines += [f"  {key}: {_text(value)}" for key, value in result.details.items() if before.get(key) != value]
        before = result.details
    return [*lines, "", *(f"{key}: {_text(value)}" for key, value in here.items())]


def _explained(name: str, result: Result | Figure) -> list[str]:
    if isinstance(result, Result):
        return [name, f"  ours:   {result.ours}", f"  theirs: {result.theirs}"]
    return [f"{name}: {_text(result.value)} {result.unit} (to reach: {_text(result.reach)})", f"  {result.what}"]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- the machine -------------------------------------------------------------------------------------------


def use_all_cores() -> None:
    """Gives torch as many threads as this process may use cores, which is what XLA's own pool takes."""
    torch.set_num_threads(cores())


def cores() -> int:
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What a figure has to be read with: device, threads, versions, command."""
    return {
        "device": f"{_processor()}, {cores()} cores",
        "platform": jax.default_backend(),
        "threads": {"torch": torch.get_num_threads(), "xla": _xla_threads()},
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else "benchmarks"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _xla_threads() -> int:
    """Threads in XLA's pool for the CPU, counted by their name, because XLA does not tell."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("XLAEigen" in name for name in names)
