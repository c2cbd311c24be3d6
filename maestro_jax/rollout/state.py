"""What the devices hold of running episodes.

Leading axes: D shards (each with groups, lanes and pages of its own; nothing moves between them), then S lanes,
B groups or M pages of a shard. A lane decodes one trajectory at a time. T is the token budget of a turn, R a
member's room.
"""

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp

from maestro_jax.parallel.sharding import keep_over_groups, keep_over_heads
from maestro_jax.policy.attention.cascade import LaneKV, Shared
from maestro_jax.policy.config import TextConfig

Array = jax.Array


class Lane(enum.IntEnum):
    """What a lane is doing."""

    EMPTY = 0
    DECODING = 1
    STOPPED = 2  # its turn ended in the last chunk
    WAITING = 3  # its turn ended before: its call is with the experts, or its trajectory is over


@dataclasses.dataclass(frozen=True)
class RolloutSizes:
    """Static shapes of a rollout, per shard but for the number of shards."""

    shards: int  # D
    lanes: int  # S
    groups: int  # B
    members: int  # C, of a group
    prefix: int  # P
    room: int  # R
    turn_budget: int  # T
    pages: int  # M, for parked keys and values
    append_rows: int  # A, lanes that receive an observation per program call; also lanes moved per program call
    prefill_groups: int  # groups prefilled per program call

    @property
    def page(self) -> int:
        """Tokens of a page: a divisor of the room, so that a lane is whole pages."""
        return math.gcd(self.room, 128)

    @property
    def pages_of_lane(self) -> int:
        return self.room // self.page


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """What the members of running groups continue."""

    shared: Shared
    hidden: Array  # [D, B, width]: final hidden state of each prefix's last token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes:
    """The lanes `[D, S]`. Tokens and log-probabilities of earlier turns are the host's."""

    status: Array  # int32 [D, S]: a `Lane`
    stop: Array  # int32 [D, S]: the `StopReason` of the last ended turn
    tokens: Array  # int32 [D, S, T]: of the current turn
    logprobs: Array  # float32 [D, S, T]: of these tokens
    written: Array  # int32 [D, S]: how many of them there are
    length: Array  # int32 [D, S]: tokens in the cache
    turn: Array  # int32 [D, S]: number of the current turn
    automaton: Array  # int32 [D, S]: state of the stop automaton
    hidden: Array  # [D, S, width]: final hidden state from which the next token is predicted
    keys: Array  # uint32 [D, S, 2]: random key data, from (seed, step, task, member)
    member_slot: Array  # int32 [D, S]: group * C + member, B C in a lane without a trajectory
    cache: LaneKV


def empty_lanes(sizes: RolloutSizes, config: TextConfig, dtype: jnp.dtype) -> Lanes:
    lanes = (sizes.shards, sizes.lanes)
    zeros, turns = jnp.zeros(lanes, jnp.int32), (*lanes, sizes.turn_budget)
    made = Lanes(
        status=zeros,
        stop=zeros,
        tokens=jnp.zeros(turns, jnp.int32),
        logprobs=jnp.zeros(turns, jnp.float32),
        written=zeros,
        length=zeros,
        turn=zeros,
        automaton=zeros,
        hidden=jnp.zeros((*lanes, config.hidden_size), dtype),
        keys=jnp.zeros((*lanes, 2), jnp.uint32),
        member_slot=jnp.full(lanes, sizes.groups * sizes.members, jnp.int32),
        cache=LaneKV([], []),
    )
    # Constants depend on nothing that is sharded: without this every device would hold every lane.
    made = jax.tree.map(keep_over_groups, made)
    cache = empty_kv((*lanes, config.num_key_value_heads, sizes.room, config.head_dim), config, dtype)
    return dataclasses.replace(made, cache=cache)


def empty_pages(sizes: RolloutSizes, config: TextConfig, dtype: jnp.dtype) -> LaneKV:
    """Room for parked keys and values: L x `[D, M, K, page, H]`."""
    shape = (sizes.shards, sizes.pages, config.num_key_value_heads, sizes.page, config.head_dim)
    return empty_kv(shape, config, dtype)


def empty_groups(sizes: RolloutSizes, config: TextConfig, dtype: jnp.dtype) -> Groups:
    """Groups without a root and without prefixes."""
    rows, heads, size = (sizes.shards, sizes.groups), config.num_key_value_heads, config.head_dim
    layers = range(config.num_hidden_layers)
    return Groups(
        Shared(
            root_keys=[],
            root_values=[],
            keys=[_no_kv((*rows, heads, size, sizes.prefix), dtype) for _ in layers],
            values=[_no_kv((*rows, heads, sizes.prefix, size), dtype) for _ in layers],
            mask=keep_over_groups(jnp.zeros((*rows, sizes.prefix), bool)),
            next_position=keep_over_groups(jnp.zeros(rows, jnp.int32)),
        ),
        hidden=keep_over_groups(jnp.zeros((*rows, config.hidden_size), dtype)),
    )


def empty_kv(shape: tuple[int, ...], config: TextConfig, dtype: jnp.dtype) -> LaneKV:
    layers = range(config.num_hidden_layers)
    return LaneKV([_no_kv(shape, dtype) for _ in layers], [_no_kv(shape, dtype) for _ in layers])


def _no_kv(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return keep_over_heads(jnp.zeros(shape, dtype), axis=2)
