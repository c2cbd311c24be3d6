"""The programs of an update (`grpo/update.py`), compiled as a run would."""

from typing import Any

import jax
import jax.numpy as jnp

from maestro_jax.aot.program import Program
from maestro_jax.aot.rollouts import Rollouts
from maestro_jax.aot.run import Run
from maestro_jax.grpo.losses import LossCount
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import GroupBatch, grpo_loss, make_train_step
from maestro_jax.policy.flops import root_flops
from maestro_jax.session.policy import update_config


def update_programs(run: Run, rollouts: Rollouts) -> list[Program]:
    """The train step: the gradients of a microbatch, and what applies their sum."""
    config = run.config
    step = make_train_step(
        run.graph,
        make_optimizer(config.optimizer),
        grpo_loss,
        update_config(config, config.rollout.temperature),
        run.mesh,
        run.state,
    )
    batch = planned_microbatch(run)
    # Episodes that outlive a step keep their keys and values; those of a step that streams, the weights as well.
    held: list[Any] = [run.reference, *(rollouts.episodes if config.rollout.ahead else ())]
    none = jax.tree.map(lambda n: run.array((), jnp.asarray(n).dtype, run.everywhere), LossCount(0, 0))
    root = root_flops(run.architecture, run.sizes.root).total / run.mesh.shape["tensor"]  # on every device
    forward = run.group_flops(run.sizes.microbatch, run.sizes.members) + root
    flops = (4 if config.policy.remat else 3) * forward
    microbatch = (run.params, run.gradients if config.grpo.microbatches > 1 else None, batch)
    meanwhile = [run.state.opt_state, *held, *((rollouts.weights, *rollouts.episodes) if run.streams else ())]
    accumulate = run.compile("accumulate", step.accumulate, microbatch, meanwhile, flops)
    with jax.set_mesh(run.mesh):
        _, sums, _ = jax.eval_shape(step.accumulate, *microbatch)
    last = (run.state, run.gradients, run.spread(sums, run.everywhere), none)
    return [accumulate, run.compile("apply", step.apply, last, held)]


def planned_microbatch(run: Run) -> GroupBatch:
    """The largest microbatch: longest members, all of their tokens in the loss."""
    s, array, groups = run.sizes, run.array, run.sizes.microbatch
    members, tokens = (groups, s.members), (groups, s.members, s.room)
    return GroupBatch(
        run.prompts(groups),
        array(tokens, jnp.int32),
        array(members, jnp.int32),
        array(tokens, jnp.bool_),
        array(tokens, jnp.float32),
        array(tokens, jnp.float32),
        array(members, jnp.float32),
        array((groups, s.members * s.room), jnp.int32),
    )
