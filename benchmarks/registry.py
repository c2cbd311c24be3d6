"""Calls to an expert over HTTP: the registry against plain loops of the openai client and of aiohttp.

    python -m benchmarks.registry [--json FILE] [--pairs 7] [--peers DIR] [--smoke]

One loopback server in a process of its own answers at once; each client has a process of its own too and makes the same
calls, one load after the other, in turns. Ours are whole calls of a skill with one stage, every one another question:
resolved, rendered, looked up in the cache, counted, sent, checked, kept, journaled. Theirs send a request and read the
reply.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from benchmarks import pairs
from benchmarks.expert_server import ServerProcess
from benchmarks.pairs import Figure, Result
from benchmarks.peers import environment
from benchmarks.peers.worker import Worker
from maestro_jax import command
from maestro_jax.observe.progress import Progress

LOADS = {1: 400, 64: 1536, 512: 2048}  # calls by how many are in flight
SMOKE_LOADS = {1: 110, 8: 110}
REACH_ADDED = 1.0  # milliseconds of the median at 1 in flight

_OURS = "Registry.call: a skill with one stage, its expert behind one endpoint"
_THEIRS = {
    "aiohttp": "ClientSession.post and response.json() in a loop",
    "openai": "AsyncOpenAI().chat.completions.create in a loop",
}

Loads = Mapping[int, int]
Measured = dict[str, list[dict[str, float]]]  # by side: seconds, p50 and p99 of each load


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # nothing here computes
    with Progress(sys.stderr) as progress:
        results = run(
            SMOKE_LOADS if pairs.SMOKE.value else LOADS, pairs.PAIRS.value, Path(environment.PEERS.value), progress
        )
    pairs.report(results)


def run(loads: Loads, count: int, peers: Path, progress: Progress) -> dict[str, Result | Figure]:
    """Every load, `count` times on each side."""
    requirements = Path(environment.__file__).with_name("openai.txt")
    python = environment.python(requirements, peers, progress)
    with ExitStack() as stack:
        port = stack.enter_context(ServerProcess()).port
        ours = stack.enter_context(Worker(sys.executable, "benchmarks.registry_worker"))
        theirs = stack.enter_context(Worker(python, "benchmarks.peers.openai_worker"))
        versions = theirs.call("versions")
        results: dict[str, Result | Figure] = {}
        for in_flight, calls in loads.items():
            load = {"port": port, "calls": calls, "in_flight": in_flight}
            results |= compare(load, take_turns(ours, theirs, load, count, progress), versions)
    return results


def take_turns(ours: Worker, theirs: Worker, load: Mapping[str, Any], count: int, progress: Progress) -> Measured:
    """One load on every side, `count` times; every second time in the other order."""
    sides = ["ours", "aiohttp", "bare", "openai"]
    measured: Measured = {side: [] for side in sides}
    progress.phase(f"{load['in_flight']} in flight", count)
    for number in range(count):
        for side in sides if number % 2 == 0 else sides[::-1]:
            found = ours.call("run", **load) if side == "ours" else theirs.call("run", client=side, **load)
            measured[side].append(found)
        progress.update(number + 1, {side: load["calls"] / measured[side][-1]["seconds"] for side in sides})
    return measured


def compare(load: Mapping[str, Any], measured: Measured, versions: Mapping[str, str]) -> dict[str, Result | Figure]:
    """Ratios to both peers, and what a call takes beyond the bare server."""
    in_flight = load["in_flight"]
    details = {
        "calls": load["calls"],
        "calls_per_second": {side: load["calls"] / median(found, "seconds") for side, found in measured.items()},
        "p50_ms": {side: 1000 * median(found, "p50") for side, found in measured.items()},
        "p99_ms": {side: 1000 * median(found, "p99") for side, found in measured.items()},
        "added_ms": {quantile: added(measured, quantile) for quantile in ("p50", "p99")},
        "peer_versions": dict(versions),
    }
    results: dict[str, Result | Figure] = {}
    for peer, what in _THEIRS.items():
        timed = [
            (own["seconds"], other["seconds"]) for own, other in zip(measured["ours"], measured[peer], strict=True)
        ]
        results[f"{peer}_{in_flight}"] = Result(_OURS, what, timed, details)
    if in_flight == 1:
        what = "the median of seconds that a call takes, less that of bare sockets, at 1 in flight"
        results["added_p50"] = Figure(what, added(measured, "p50"), "ms", REACH_ADDED, {})
    return results


def added(measured: Measured, quantile: str) -> float:
    """Milliseconds of our calls less those of bare sockets, the median over pairs."""
    pairs_of = zip(measured["ours"], measured["bare"], strict=True)
    return 1000 * statistics.median(own[quantile] - bare[quantile] for own, bare in pairs_of)


def median(found: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in found)


if __name__ == "__main__":
    command.run(main, required=())
