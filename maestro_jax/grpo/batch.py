"""From finished rollouts to the parts of an update's batch: rewards, advantages, masks, static shapes."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from maestro_jax.grpo.advantages import group_advantages
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.losses import LossCount, count_loss
from maestro_jax.grpo.microbatches import Part, Planner
from maestro_jax.grpo.update import GroupBatch, batch_shardings
from maestro_jax.policy.prompts import take_prompts
from maestro_jax.rewards.reward import EpisodeSummary, RewardConfig, RewardParts, score_all
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards of a rollout's trajectories."""

    parts: list[list[RewardParts]]  # [tasks][G]
    rewards: np.ndarray  # float [B, G], 0 for groups that pad the batch
    valid: np.ndarray  # bool [B, G], False for marked and padding members


def score_rollout(rollout: Rollout, config: RewardConfig) -> Scored:
    """Grades every trajectory; the gold answers are read here only."""
    scored = iter(score_all([(t.task, summary(t)) for group in rollout.trajectories for t in group], config))
    parts = [[next(scored) for _ in group] for group in rollout.trajectories]
    rewards = np.zeros(rollout.length.shape)
    valid = np.zeros(rollout.length.shape, bool)
    for g, group in enumerate(rollout.trajectories):
        for m, trajectory in enumerate(group):
            rewards[g, m], valid[g, m] = parts[g][m].total, not trajectory.marked
    return Scored(parts, rewards, valid)


def summary(trajectory: Trajectory) -> EpisodeSummary:
    return EpisodeSummary(
        answer=trajectory.answer,
        executed_calls=trajectory.executed_calls,
        well_formed=trajectory.well_formed,
        price=trajectory.price,
        seconds=sum(observation.seconds for _, observation in trajectory.calls),
    )


def make_parts(
    rollout: Rollout, scored: Scored, advantage: str, contrast_only: bool, planner: Planner, mesh: Mesh
) -> tuple[list[GroupBatch], LossCount, dict[str, float]]:
    """The parts of the update's batch on the mesh.

    Args:
      advantage: of `advantages.py: NORMALISERS`.
      contrast_only: leaves out groups without contrast; right where the loss is nothing but advantages.

    Returns:
      The parts, the count of the groups that are in none of them but in what the loss is divided by, and what is worth
      logging.
    """
    advantages, contrast = group_advantages(scored.rewards, scored.valid, advantage)
    mask = rollout.authored & scored.valid[..., None]
    # At least one group stays: without any, moments and rates would still have to move on.
    kept = np.flatnonzero(contrast if contrast_only else mask.any(axis=(1, 2)))
    kept = kept if len(kept) else np.array([0])
    lengths = rollout.prompts.mask.sum(axis=1)[kept].tolist(), rollout.length.max(axis=1)[kept].tolist()
    plan = planner.plan(*lengths)
    parts = [take_part(rollout, mask, advantages, kept[list(part.groups)], part) for part in plan]
    left_out = count_loss(np.delete(mask, kept, axis=0))
    tasks = max(len(rollout.trajectories), 1)
    metrics = {
        "groups_without_contrast": 1.0 - float(contrast[:tasks].mean()),
        "marked_trajectories": float((~scored.valid[:tasks]).mean()),
        "member_tokens": float(rollout.length[:tasks].mean()),
        "parts": float(len(parts)),
        "padding": planner.padding(plan, *lengths),
    }
    return [jax.device_put(part, batch_shardings(mesh)) for part in parts], left_out, metrics


def take_part(rollout: Rollout, mask: np.ndarray, advantages: np.ndarray, groups: np.ndarray, part: Part) -> GroupBatch:
    """Groups of a rollout in the static shape of a part, numpy-valued; padding repeats the first, out of the loss."""
    real = np.arange(part.size) < len(groups)
    rows = np.append(groups, np.repeat(groups[:1], part.size - len(groups)))
    logprobs = rollout.logprobs[rows, :, : part.room]
    mask = mask[rows, :, : part.room] & real[:, None, None]
    return GroupBatch(
        prompts=take_prompts(rollout.prompts, rows, part.prefix),
        tokens=rollout.tokens[rows, :, : part.room],
        length=rollout.length[rows],
        mask=mask,
        old_logprobs=logprobs,
        reference_logprobs=np.zeros_like(logprobs),
        advantages=advantages[rows] * real[:, None],
        loss_rows=loss_rows(mask),
    )
