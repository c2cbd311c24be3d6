"""One process of a rollout: `python -m tests.rollout.process_worker TALKER ADDRESS COUNT NUMBER MESH RESULT`.

MESH is DATA,FSDP,TENSOR. Writes as JSON what its own experts were asked, and the episodes that it served.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from jax.sharding import Mesh

from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.registry.dispatch import Dispatcher
from tests.rollout import episodes

SECONDS_TO_MEET = 60
TASKS = [episodes.task(number) for number in range(8)]
MEMBERS = 2
# On eight shards each has one lane and one group of two. Half a lane's pages: some are parked there, some on the host.
CONFIG = dataclasses.replace(
    episodes.ENGINE, lanes=8, append_rows=8, parked_tokens=episodes.EPISODE.room // 2, parked_on_host=2**30
)


@dataclasses.dataclass(frozen=True)
class Served:
    """What one process had to do with.

    Attributes:
      asked: questions of the calls that its experts got.
      moved: lanes of all processes that were filled again from the device's memory, and from the host's.
    """

    asked: list[str]
    moved: tuple[int, int]
    episodes: dict[episodes.At, episodes.Episode]


def serve(talker: episodes.Talker, mesh: Mesh, seed: int) -> Served:
    """The same rollout in every process, with experts of its own."""
    experts = episodes.Experts(longest=0.02, seed=seed)
    with episodes.engine(talker, Dispatcher(experts), CONFIG, mesh) as run:
        rows = run.engine.own_rows(len(TASKS))
        found = {(rows[g], m): episode for (g, m), episode in episodes.episodes(run(TASKS, MEMBERS)).items()}
        return Served(experts.answered, (run.total("loaded"), run.total("brought_back")), found)


def main(talker: str, address: str, count: str, number: str, mesh: str, result: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(number), initialization_timeout=SECONDS_TO_MEET)
    axes = MeshConfig(*map(int, mesh.split(",")))
    served = serve(episodes.read_talker(Path(talker)), make_mesh(axes), seed=int(number))
    lines = [[*at, episode.tokens, episode.logprobs, episode.authored] for at, episode in served.episodes.items()]
    Path(result).write_text(json.dumps([served.asked, served.moved, lines]))


def read(result: Path) -> Served:
    asked, moved, lines = json.loads(result.read_text())
    return Served(asked, tuple(moved), {(g, m): episodes.Episode(*episode) for g, m, *episode in lines})


if __name__ == "__main__":
    main(*sys.argv[1:])
