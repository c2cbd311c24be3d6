"""What was trained on: a record of a step's groups, for trained.jsonl, by which two runs are compared."""

import hashlib
from collections.abc import Sequence
from typing import Any

from maestro_jax.grpo.batch import Scored, rewards_of
from maestro_jax.grpo.skipped import Skipped
from maestro_jax.parallel import cluster
from maestro_jax.rewards.reward import RewardParts
from maestro_jax.rollout.engine import Rollout


def trained_row(step: int, seen: Sequence[tuple[Rollout, Scored]], skipped: Skipped | None = None) -> dict[str, Any]:
    """Plain JSON, of all processes: of each group its task, the rewards of its members, a digest of their trajectories.

    The digest tells tokens, their log-probabilities to the last bit, and whose they are. With `grpo.refill`, "replaced"
    has the groups that were run and not trained on, so that every task stands in one row once. "skipped" says what was
    not finite where the update changed nothing.
    """
    row = {"step": step, "groups": cluster.joined([_groups(rollout, scored) for rollout, scored in seen])}
    if any(rollout.replaced is not None for rollout, _ in seen):
        row["replaced"] = cluster.joined([_replaced(rollout) for rollout, _ in seen])
    return row | ({"skipped": skipped.to_json()} if skipped else {})


def _groups(rollout: Rollout, scored: Scored) -> list[dict[str, Any]]:
    return [
        {
            "task": members[0].task.id,
            "rewards": _totals(scored.parts[number]),
            "trajectories": _digest(rollout, number),
        }
        for number, members in enumerate(rollout.trajectories)
    ]


def _replaced(rollout: Rollout) -> list[dict[str, Any]]:
    groups = rollout.replaced or []
    return [
        {"task": members[0].task.id, "rewards": _totals(rewards)}
        for members, rewards in zip(groups, rewards_of(groups), strict=True)
    ]


def _totals(members: Sequence[RewardParts]) -> list[float | None]:
    """None where a judge gave no verdict: JSON has no NaN."""
    return [None if parts.unjudged else parts.total for parts in members]


def _digest(rollout: Rollout, number: int) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for array in (rollout.tokens, rollout.logprobs, rollout.authored, rollout.length):
        whole.update(array[number].tobytes())
    return whole.hexdigest()
