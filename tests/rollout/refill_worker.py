"""A process whose steps replace groups: `python -m tests.rollout.refill_worker TOKENS ADDRESS COUNT NUMBER RESULT`.

Only the first process has a group without contrast, so the others have nothing to run in the second round. Writes as
JSON which tasks were trained and replaced, and where the data goes on.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from maestro_jax.data.pipeline import Batches
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.tokens import load_tokens
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.supply import Supply, SupplyConfig
from tests.data.listed import Listed
from tests.rollout import toy
from tests.rollout.test_engine import Experts, bigram_runner

SECONDS_TO_MEET = 60
GROUPS, MEMBERS, TASKS, STEPS = 4, 2, 12, 2
WITHOUT = (toy.task(0).id, toy.task(4).id)  # contrast


def contrast(rollout: Rollout) -> np.ndarray:
    return np.array([group[0].task.id not in WITHOUT for group in rollout.trajectories])


def main(tokenizer: str, address: str, count: str, number: str, result: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(number), initialization_timeout=SECONDS_TO_MEET)
    runner = bigram_runner(
        load_tokens(tokenizer), make_mesh(MeshConfig(1, len(jax.devices()), 1)), Experts(0.01, seed=int(number))
    )
    source, prepare = Listed(toy.task(n) for n in range(TASKS)), runner.engine.prompts.prepare
    share = {"process_index": int(number), "process_count": int(count)}
    batches = iter(Batches(source, GROUPS, prepare, seed=0, shuffle=False, **share))
    supply = Supply(runner.engine, batches, SupplyConfig(GROUPS, MEMBERS, 1, 0, 0, 2), 0, None, contrast)
    steps = []
    for step in range(1, STEPS + 1):
        (rollout,) = supply.step(runner.params, step)
        groups = rollout.trajectories, rollout.replaced or []
        steps.append([[group[0].task.id for group in each] for each in groups])
        assert all(member.finished for each in groups for group in each for member in group)
    Path(result).write_text(json.dumps([steps, supply.get_state()]))
    runner.dispatcher.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
