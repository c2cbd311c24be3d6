"""Updates of a run: the train step and what feeds it, as the config sets them up."""

from typing import Any

import jax

from maestro_jax.config import Config
from maestro_jax.grpo.learner import Learner
from maestro_jax.grpo.microbatches import Planner
from maestro_jax.grpo.optimizer import make_optimizer
from maestro_jax.grpo.update import (
    GroupBatch,
    TrainState,
    grpo_loss,
    init_train_state,
    make_reference,
    make_train_step,
)
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.rollout.supply import SupplyConfig
from maestro_jax.session.policy import update_config
from maestro_jax.session.rollouts import Rollouts


def make_learner(config: Config, rollouts: Rollouts, progress: Progress) -> tuple[Learner, TrainState]:
    """What makes an update of a step's rollouts, and the state that the first one starts from.

    Args:
      rollouts: with the policy that reinforcement starts from.
    """
    grpo, mesh = config.grpo, rollouts.mesh
    optimizer = make_optimizer(config.optimizer)
    state = init_train_state(rollouts.params, optimizer, config.policy.freeze, mesh, config.optimizer.offload)
    update = update_config(config, config.rollout.temperature)
    add_reference = None
    if grpo.kl_weight:  # the reference is the policy that reinforcement started from
        add_reference = make_reference(rollouts.graph, rollouts.params, update.temperature, update.chunk, mesh)
    shapes: set[tuple[Any, ...]] = set()  # that the update is compiled for

    def prepare(microbatch: GroupBatch) -> GroupBatch:
        note_shape(microbatch, shapes, progress)
        return add_reference(microbatch) if add_reference else microbatch

    per_step, processes = supply_config(config).rollouts_per_step, jax.process_count()
    planner = Planner(  # of this process's part of every batch; the plan is the same in all of them
        rollouts.architecture,
        len(rollouts.prompts.root),
        grpo.group_size,
        grpo.groups // per_step // processes,
        grpo.microbatches // per_step,
        batch_shards(mesh) // processes,
        config.policy.prefix_buckets,
        config.rollout.member_buckets,
    )
    learner = Learner(
        step=make_train_step(rollouts.graph, optimizer, grpo_loss, update, mesh, state),
        planner=planner,
        reward=rollouts.scorer,
        advantage=grpo.advantage,
        # Without contrast, only these terms have a gradient.
        contrast_only=not (grpo.kl_weight or grpo.entropy_weight),
        rollouts_per_step=per_step,
        prepare=prepare,
        mesh=mesh,
    )
    return learner, state


def supply_config(config: Config) -> SupplyConfig:
    grpo, rollout = config.grpo, config.rollout
    per_step = grpo.microbatches if grpo.stream else 1
    return SupplyConfig(grpo.groups, grpo.group_size, per_step, rollout.ahead, rollout.staleness, grpo.refill)


def note_shape(
    microbatch: GroupBatch, shapes: set[tuple[Any, ...]], progress: Progress, of: str = "the update"
) -> None:
    """Says when a shape is new, for then programs are compiled: they are kept by what every array looks like."""
    if (shape := tuple(map(jax.typeof, jax.tree.leaves(microbatch)))) not in shapes:
        shapes.add(shape)
        (groups, members, room), prefix = microbatch.tokens.shape, microbatch.prompts.tokens.shape[1]
        rows, (images, patches) = microbatch.loss_rows.shape[1], microbatch.prompts.images.patches.shape[:2]
        progress.note(
            f"new shape of {of}: {groups} groups of {prefix} + {members} x {room} tokens, {rows} of them in the loss; "
            f"{images} images of {patches} patches"
        )
