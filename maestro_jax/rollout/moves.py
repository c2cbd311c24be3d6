"""The pure device programs that give lanes to trajectories and carry their keys and values in and out.

A lane whose trajectory waits for an expert can be given to another one. What the first has computed goes to pages on
the device, or to the host, and comes back when the expert has answered: nothing is computed twice. Each program
moves at most A lanes of a shard.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maestro_jax.policy.attention.cascade import LaneKV, put, take
from maestro_jax.rollout.state import Groups, Lanes, RolloutSizes

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneStarts:
    """Which trajectory each lane decodes from now on, and from where."""

    changed: Array  # int32 [D, S]: 1 where the lane gets another trajectory, or none
    status: Array  # int32 [D, S]: DECODING, or EMPTY
    member_slot: Array  # int32 [D, S]
    length: Array  # int32 [D, S]: tokens that the trajectory has already
    turn: Array  # int32 [D, S]: its turn
    keys: Array  # uint32 [D, S, 2]: its random key data


def assign_lanes(groups: Groups, lanes: Lanes, starts: LaneStarts, sizes: RolloutSizes) -> Lanes:
    """Gives lanes to other trajectories. A first turn goes on from the prefix's last state."""
    group = jnp.minimum(starts.member_slot // sizes.members, sizes.groups - 1)
    changed = starts.changed > 0

    def new(before: Array, after: Array | int) -> Array:
        return jnp.where(changed, after, before)

    return dataclasses.replace(
        lanes,
        status=new(lanes.status, starts.status),
        stop=new(lanes.stop, 0),
        written=new(lanes.written, 0),
        length=new(lanes.length, starts.length),
        turn=new(lanes.turn, starts.turn),
        automaton=new(lanes.automaton, 0),
        hidden=jnp.where(changed[..., None], take(groups.hidden, group), lanes.hidden),
        keys=jnp.where(changed[..., None], starts.keys, lanes.keys),
        member_slot=new(lanes.member_slot, starts.member_slot),
    )


def park(lanes: Lanes, pages: LaneKV, at: Array, table: Array) -> LaneKV:
    """Pages with what stands in lanes `at [D, A]` copied to pages `table [D, A, n]`; M leaves a page out."""

    def one(pages: Array, cache: Array) -> Array:
        page, h = pages.shape[3:]
        rows = take(cache, at)  # [D, A, K, R, H]
        return put(pages, table, jnp.moveaxis(rows.reshape(*rows.shape[:3], -1, page, h), 3, 2))

    return jax.tree.map(one, pages, lanes.cache)


def load(lanes: Lanes, pages: LaneKV, at: Array, table: Array) -> Lanes:
    """Lanes `at [D, A]` (S: none) with what stands in pages `table [D, A, n]`; whatever M stands for, nobody reads."""

    def one(cache: Array, pages: Array) -> Array:
        rows = jnp.moveaxis(take(pages, table), 2, 3)  # [D, A, K, n, page, H]
        return put(cache, at, rows.reshape(*rows.shape[:3], *cache.shape[3:]))

    return dataclasses.replace(lanes, cache=jax.tree.map(one, lanes.cache, pages))


def unload(lanes: Lanes, at: Array) -> LaneKV:
    """What stands in lanes `at [D, A]`, for the host: L x `[D, A, K, R, H]`."""
    return jax.tree.map(lambda x: take(x, at), lanes.cache)


def bring_back(lanes: Lanes, at: Array, rows: LaneKV) -> Lanes:
    """Lanes `at [D, A]` (S: none) with rows that `unload` gave the host."""
    return dataclasses.replace(lanes, cache=jax.tree.map(lambda x, new: put(x, at, new), lanes.cache, rows))
