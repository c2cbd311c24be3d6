"""One process of a rollout: `python -m tests.rollout.process_worker TALKER ADDRESS COUNT NUMBER MESH RESULT`.

MESH is DATA,FSDP,TENSOR. Writes as JSON what its own experts were asked, and the episodes that it served.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Rollout
from tests.rollout import episodes

SECONDS_TO_MEET = 60
TASKS = [episodes.task(number) for number in range(8)]
MEMBERS = 2
CONFIG = dataclasses.replace(
    episodes.ENGINE, lanes=8, append_rows=8, parked_tokens=episodes.EPISODE.room, parked_on_host=2**30
)


def sample(run: episodes.Runner) -> Rollout:
    """The same rollout in every process; on eight shards each has one lane and one group of two."""
    return run(TASKS, MEMBERS)


def main(talker: str, address: str, count: str, number: str, mesh: str, result: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(number), initialization_timeout=SECONDS_TO_MEET)
    experts = episodes.Experts(longest=0.02, seed=int(number))
    axes = MeshConfig(*map(int, mesh.split(",")))
    speaker, dispatcher = episodes.read_talker(Path(talker)), Dispatcher(experts)
    with episodes.engine(speaker, dispatcher, CONFIG, make_mesh(axes)) as run:
        served = episodes.episodes(sample(run))
    lines = [[*at, episode.tokens, episode.logprobs, episode.authored] for at, episode in served.items()]
    Path(result).write_text(json.dumps({"asked": experts.answered, "episodes": lines}))


if __name__ == "__main__":
    main(*sys.argv[1:])
