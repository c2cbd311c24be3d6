"""One process of several: `python -m tests.parallel.cluster_worker NAME [ARGUMENT]`, found by the environment.

NAME is a function below; what it prints is what a test sees.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maestro_jax import command
from maestro_jax.errors import ConfigError
from maestro_jax.parallel import cluster
from maestro_jax.rollout.outages import Marks, OutageConfig, Outages
from maestro_jax.types import Status


def talk() -> None:
    """Passes values around, with more of them than keys are kept."""
    cluster.start()
    me = jax.process_index()
    for number in range(3):
        found = cluster.gather({"from": me, "text": "é\n", "value": 0.1 + me, "round": number})
    told = cluster.from_main(lambda: [me, None])
    joined = cluster.joined([[f"a{me}"], [f"b{me}", f"c{me}"]])
    print(json.dumps([found, told, joined, cluster.is_main()]))


def share(directory: str) -> None:
    cluster.start()
    cluster.check_shared(Path(directory) if cluster.is_main() else Path(directory) / "elsewhere")


def wait() -> None:
    """Waits for what never comes."""
    cluster.start()
    say_ready()
    time.sleep(600)


def add_up() -> None:
    """Adds over all devices, for ever."""
    cluster.start()
    mesh = Mesh(np.array(jax.devices()), "all")
    ones = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), np.ones(1))
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    for number in range(10**9):
        float(add(ones))
        if not number:
            say_ready()


def fail() -> None:
    """Process 0 has something to complain about while the others wait for it."""
    cluster.start()
    if cluster.is_main():
        raise ConfigError("this host has no such file; put it there")
    cluster.gather(None)


def refuse() -> None:
    """What process 0 does for all ends with an error of the user's."""
    cluster.start()

    def read() -> None:
        raise ConfigError("row 7 has no grader; correct it")

    cluster.from_main(read)


def outage() -> None:
    """The experts of process 1 are out for a while; then those that process 0 asks for all, for too long."""
    cluster.start()
    failed, back = Status.UNAVAILABLE if jax.process_index() else Status.OK, time.monotonic() + 1.0
    own = Marks.of((number < 2 and failed is not Status.OK, [("Lens", failed)]) for number in range(4))

    def shunned() -> dict[str, str]:
        return {"Lens": "away"} if jax.process_index() and time.monotonic() < back else {}

    outages = Outages(OutageConfig(0.2, 60.0), ["Lens"], shunned, lambda line: print(line, flush=True))
    goes_on = outages.tolerates(own.everywhere(), "episodes")
    print(goes_on, outages.tolerates(Marks(total=8), "episodes"), flush=True)
    stern = Outages(OutageConfig(0.2, 0.0), ["Lens"], dict, print)
    cluster.from_main(lambda: stern.tolerates(Marks(4, 4, experts={"Lens": 4}), "calls"))


def meet(seconds: str) -> None:
    cluster.start(seconds=int(seconds))


def say_ready() -> None:
    print("ready", flush=True)


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    del sys.argv[1:]  # what is left are flags
    command.run(lambda _: globals()[name](*arguments), required=())
