"""What was trained on: a record of a step's groups, for trained.jsonl, by which two runs are compared."""

import hashlib
from collections.abc import Sequence
from typing import Any

from maestro_jax.grpo.batch import Scored
from maestro_jax.parallel import cluster
from maestro_jax.rollout.engine import Rollout


def trained_row(step: int, seen: Sequence[tuple[Rollout, Scored]]) -> dict[str, Any]:
    """Plain JSON, of all processes: of each group its task, the rewards of its members, a digest of their trajectories.

    The digest tells tokens, their log-probabilities to the last bit, and whose they are.
    """
    return {"step": step, "groups": cluster.joined([_groups(rollout, scored) for rollout, scored in seen])}


def _groups(rollout: Rollout, scored: Scored) -> list[dict[str, Any]]:
    return [
        {
            "task": members[0].task.id,
            "rewards": [parts.total for parts in scored.parts[number]],
            "trajectories": _digest(rollout, number),
        }
        for number, members in enumerate(rollout.trajectories)
    ]


def _digest(rollout: Rollout, number: int) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for array in (rollout.tokens, rollout.logprobs, rollout.authored, rollout.length):
        whole.update(array[number].tobytes())
    return whole.hexdigest()
