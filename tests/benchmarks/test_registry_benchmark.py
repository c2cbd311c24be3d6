"""The registry's load on the loopback server, at toy size; the peers have an environment of their own."""

import sys

from benchmarks.expert_server import ServerProcess
from benchmarks.peers.worker import Worker
from benchmarks.registry import compare


def test_our_side_makes_every_call() -> None:
    with ServerProcess() as server, Worker(sys.executable, "benchmarks.registry_worker") as worker:
        found = worker.call("run", port=server.port, calls=120, in_flight=8)
    assert 0 < found["p50"] <= found["p99"] <= found["seconds"]


def test_ratios_and_what_is_added() -> None:
    def side(seconds: float) -> list[dict[str, float]]:
        return [{"seconds": seconds * n, "p50": seconds / 100, "p99": seconds / 10} for n in (1.0, 2.0, 4.0)]

    measured = {"ours": side(2.0), "aiohttp": side(1.5), "openai": side(20.0), "bare": side(0.5)}
    results = compare({"calls": 100, "in_flight": 1}, measured, {})
    assert (results["aiohttp_1"].ratio, results["openai_1"].ratio) == (0.75, 10.0)  # type: ignore[union-attr]
    assert round(results["added_p50"].value, 6) == 15.0  # type: ignore[union-attr]
