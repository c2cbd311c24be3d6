"""What a plan of the update is made for."""

import jax
import numpy as np

from configs import quickstart
from maestro_jax.aot.run import Run, RunSizes
from maestro_jax.aot.updates import planned_microbatch
from maestro_jax.config import parse_config
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.parallel.mesh import make_mesh
from maestro_jax.session.policy import known_architecture
from maestro_jax.session.rollouts import sized_episodes


def test_the_update_is_planned_for_the_widest_rows_of_the_loss() -> None:
    config = sized_episodes(parse_config(quickstart.get_config()), lambda text: len(text) // 4, print)
    sizes = RunSizes.of(config, root=16, observation=34)
    run = Run(config, known_architecture(config), sizes, make_mesh(config.mesh, jax.devices()[:1]), {})
    microbatch = planned_microbatch(run)
    groups, members, room = microbatch.tokens.shape
    assert (members, room) == (config.grpo.group_size, config.rollout.room)
    widest = max(loss_rows(np.ones((groups, members, size), bool)).shape[1] for size in config.rollout.member_buckets)
    assert microbatch.loss_rows.shape == (groups, widest)
