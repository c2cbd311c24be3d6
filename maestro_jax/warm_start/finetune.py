"""Supervised fine-tuning on demonstrations, with the same group-shaped train step as GRPO."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch, Metrics, TrainState
from maestro_jax.parallel.sharding import from_everyone, over_groups
from maestro_jax.policy.model import prompt_shardings
from maestro_jax.policy.preprocess import bucket
from maestro_jax.policy.prompts import Prompts
from maestro_jax.warm_start.demonstrations import Demonstration


def finetune(
    step: Callable[[TrainState, Sequence[GroupBatch]], tuple[TrainState, Metrics]],
    state: TrainState,
    demonstrations: Sequence[Sequence[Demonstration]],
    most: int,
    groups: int,
    steps: int,
    prompts: Prompts,
    buckets: Sequence[int],
    mesh: Mesh,
    seed: int,
    done: int = 0,
    note_tasks: Callable[[Sequence[str]], None] = lambda tasks: None,
) -> Iterator[tuple[int, TrainState, dict[str, float]]]:
    """Trains for `steps` batches of `groups` groups; gives after each: steps done, the new state, metrics.

    Args:
      demonstrations: groups of demonstrations of one task each; shuffled anew in every pass.
      most: tokens in the loss of the group that has most, as of `collate`.
      done: batches that `state` was trained on by an earlier start.
      note_tasks: hears the tasks of each batch, group by group, before it is trained on.
    """
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for number in range(1, steps + 1):
        while len(order) < groups:
            order.extend(rng.permutation(len(demonstrations)))
        chosen, order = order[:groups], order[groups:]
        if number <= done:
            continue
        given = [list(demonstrations[i]) for i in chosen]  # once, as in `collate`
        batch = collate(given, prompts, buckets, mesh, most)
        note_tasks([group[0].task.id for group in given])
        with jax.set_mesh(mesh):
            state, metrics = step(state, [batch])
        yield number, state, {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}


def collate(
    groups: Sequence[Sequence[Demonstration]], prompts: Prompts, buckets: Sequence[int], mesh: Mesh, most: int = 0
) -> GroupBatch:
    """Demonstrations as the members of groups; the loss is on what a policy would have authored.

    Args:
      most: tokens in the loss of the group that has most in any batch, so that all are compiled for the same.
    """
    groups = [list(group) for group in groups]  # once: each may be read from disk whenever it is asked for
    longest = max(len(member.ids) for group in groups for member in group)
    cure = "set config.rollout.room=0, which is computed, or raise turn_budget: an answer quotes a whole observation"
    width = bucket(longest, buckets, "a demonstration", cure)
    shape = (len(groups), len(groups[0]), width)
    tokens, mask, length = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[:2], np.int32)
    for g, group in enumerate(groups):
        for m, member in enumerate(group):
            n = len(member.ids)
            tokens[g, m, :n], mask[g, m, :n], length[g, m] = member.ids, member.authored, n
    zeros = np.zeros(shape, np.float32)
    prefixes = from_everyone(prompts.batch([group[0].task for group in groups]), prompt_shardings(mesh))
    rows = loss_rows(mask, most)
    arrays = from_everyone((tokens, length, mask, zeros, zeros, zeros[..., 0], rows), over_groups(mesh))
    return GroupBatch(prefixes, *arrays)
