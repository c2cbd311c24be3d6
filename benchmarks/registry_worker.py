"""Our registry in a process of its own, as its peers are: whole calls of a skill with one stage, journaled."""

import asyncio
import os
import tempfile
from typing import Any

from benchmarks.peers.load import drive
from benchmarks.peers.protocol import serve
from maestro_jax.command import tune_collector
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.registry.record.journal import Journal
from maestro_jax.types import Call

_DEADLINE = 300.0


def registry_config(port: int, in_flight: int) -> dict[str, Any]:
    expert = {
        "name": "Served",
        "description": "says what a figure shows",
        "endpoints": (f"http://127.0.0.1:{port}/v1",),
        "model": "m",
        "concurrency": in_flight,
    }
    stage = {"kind": "ask", "output": "answer", "prompt": "{query}"}
    return {"experts": (expert,), "services": (), "skills": ({"name": "Ask", "stages": (stage,)},)}


async def _run(port: int, calls: int, in_flight: int, directory: str) -> dict[str, float]:
    journal = Journal(os.path.join(directory, "journal.jsonl"))
    registry = Registry(parse_registry(registry_config(port, in_flight)), journal=journal)

    async def ask(question: str) -> str:
        call = Call("Served", "Ask", question)
        observation = await registry.call(call, "", (), _DEADLINE)
        journal.call("benchmark", call, "", (), observation)  # as the dispatcher does
        return observation.text

    async def warm_up(question: str) -> str:
        # No question of the load: it would be answered from the cache.
        return await ask(f"warm-up {question}")

    try:
        await drive(warm_up, in_flight, in_flight)
        return await drive(ask, calls, in_flight)
    finally:
        await registry.close()
        journal.close()


class Peer:
    """What this process answers to."""

    def run(self, **load: Any) -> dict[str, float]:
        """One load; see `load.drive`."""
        with tempfile.TemporaryDirectory() as directory:
            return asyncio.run(_run(**load, directory=directory))


if __name__ == "__main__":
    tune_collector()  # as every command does
    serve(Peer())
