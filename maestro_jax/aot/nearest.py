"""Changes to a config that make a run smaller, those first that cost least."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict


def changes(raw: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Settings to try, the least loss first; each is added to those before."""
    overrides: dict[str, Any] = {}

    def add(**more: Any) -> dict[str, Any]:
        overrides.update({key.replace("__", "."): value for key, value in more.items()})
        return dict(overrides)

    shards = devices // raw.mesh.tensor
    whole = -(-raw.grpo.groups // shards) * shards
    if whole != raw.grpo.groups or raw.grpo.groups // raw.grpo.microbatches % shards:
        batch = -(-raw.evaluate.batch // shards) * shards
        yield add(grpo__groups=whole, grpo__microbatches=whole // shards, evaluate__batch=batch)
    elif raw.grpo.groups // raw.grpo.microbatches > shards:  # a group a device at a time: the same update, slower
        yield add(grpo__microbatches=raw.grpo.groups // shards)
    if not raw.policy.remat:
        yield add(policy__remat=True)
    if raw.optimizer.moments == "float32":
        yield add(optimizer__moments="bfloat16")
    if raw.optimizer.moments != "int8":
        yield add(optimizer__moments="int8")
    for room in sorted(raw.rollout.member_buckets, reverse=True):
        if raw.rollout.turn_budget < room and (room < raw.rollout.room or not raw.rollout.room):
            yield add(rollout__room=room)
    prefixes = tuple(sorted(raw.policy.prefix_buckets))
    for last in range(len(prefixes) - 1, 0, -1):
        yield add(policy__prefix_buckets=prefixes[:last])
