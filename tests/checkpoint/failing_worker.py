"""One process of two, as a command: `python -m tests.checkpoint.failing_worker --directory=D --fails=N [--dies=N]`.

Saves what both have a part of. In process --fails the kernel refuses to write it; process --dies is gone when it should
have begun.
"""

import os
import resource
import signal
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from maestro_jax import command
from maestro_jax.checkpoint.store import CheckpointStore
from maestro_jax.parallel import cluster
from maestro_jax.parallel.mesh import MeshConfig, make_mesh

DIRECTORY = flags.DEFINE_string("directory", "", "Of the checkpoints.")
FAILS = flags.DEFINE_integer("fails", None, "The process that cannot write.")
DIES = flags.DEFINE_integer("dies", None, "The process that is killed.")
SMALL, LARGE = 2**10, 2**18  # floats


def main(argv: Sequence[str]) -> None:
    del argv
    cluster.start()
    sharding = NamedSharding(make_mesh(MeshConfig(1, -1, 1)), PartitionSpec("fsdp"))
    store = CheckpointStore(DIRECTORY.value, keep=0)
    store.save(1, random(SMALL, sharding), {})
    store.wait()
    if jax.process_index() == FAILS.value:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE, most))
    state = random(LARGE, sharding)
    if jax.process_index() == DIES.value:
        os.kill(os.getpid(), signal.SIGKILL)
    store.save(2, state, {})
    store.close()


def random(size: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """What does not compress."""
    values = np.random.default_rng(0).standard_normal(size, np.float32)
    return {"w": jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}


if __name__ == "__main__":
    command.run(main, required=("directory",))
