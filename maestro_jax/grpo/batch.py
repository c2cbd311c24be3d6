"""From finished rollouts to the batch of an update: rewards, advantages, masks, static lengths."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from maestro_jax.grpo.advantages import group_advantages
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch
from maestro_jax.parallel.sharding import over_groups
from maestro_jax.policy.preprocess import bucket
from maestro_jax.rewards.reward import EpisodeSummary, RewardConfig, RewardParts, score
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.exchange import Trajectory


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards of a rollout's trajectories."""

    parts: list[list[RewardParts]]  # [tasks][G]
    rewards: np.ndarray  # float [B, G], 0 for groups that pad the batch
    valid: np.ndarray  # bool [B, G], False for marked and padding members


def score_rollout(rollout: Rollout, config: RewardConfig) -> Scored:
    """Grades every trajectory; the gold answers are read here only."""
    parts = [[score(t.task, summary(t), config) for t in group] for group in rollout.trajectories]
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


def make_batch(
    rollout: Rollout, scored: Scored, advantage: str, buckets: Sequence[int], mesh: Mesh
) -> tuple[GroupBatch, dict[str, float]]:
    """The update's batch on the mesh, and what is worth logging about it."""
    advantages, contrast = group_advantages(scored.rewards, scored.valid, advantage)
    width = bucket(int(rollout.length.max()), buckets, "a member", "raise config.rollout.member_buckets")
    mask = (rollout.authored & scored.valid[..., None])[..., :width]
    logprobs = rollout.logprobs[..., :width]
    arrays = (
        rollout.tokens[..., :width],
        rollout.length,
        mask,
        logprobs,
        np.zeros_like(logprobs),
        advantages,
        loss_rows(mask),
    )
    batch = GroupBatch(rollout.prompts, *jax.device_put(arrays, over_groups(mesh)))
    tasks = max(len(rollout.trajectories), 1)
    return batch, {
        "groups_without_contrast": 1.0 - float(contrast[:tasks].mean()),
        "marked_trajectories": float((~scored.valid[:tasks]).mean()),
        "member_tokens": float(rollout.length[:tasks].mean()),
        "member_bucket": float(width),
    }
