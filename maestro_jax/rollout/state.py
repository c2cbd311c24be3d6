"""What the device holds of running episodes: one lane per group member, `[B, G]` lanes."""

import dataclasses
import enum

import jax
import jax.numpy as jnp

from maestro_jax.parallel.sharding import keep_over_groups
from maestro_jax.policy.config import TextConfig
from maestro_jax.policy.text import LayerKV

Array = jax.Array


class Lane(enum.IntEnum):
    """What a lane is doing."""

    DECODING = 0
    STOPPED = 1  # its turn ended; the exchange has not seen it yet
    WAITING = 2  # its call is with the experts
    DONE = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """Lanes `[B, G]`, each with room for R member tokens."""

    tokens: Array  # int32 [B, G, R]: policy and observation tokens, as they stand in the context
    logprobs: Array  # float32 [B, G, R]: of sampled tokens, 0 elsewhere
    authored: Array  # bool [B, G, R]: True where the policy sampled the token
    length: Array  # int32 [B, G]: tokens in the buffer
    turn: Array  # int32 [B, G]: number of the current turn
    turn_start: Array  # int32 [B, G]: where the current turn begins
    lane: Array  # int32 [B, G]: a `Lane`
    stop: Array  # int32 [B, G]: the `StopReason` of the last ended turn
    automaton: Array  # int32 [B, G]: state of the stop automaton
    hidden: Array  # [B, G, D]: final hidden state from which the next token is predicted
    keys: Array  # uint32 [B, G, 2]: the lane's random key data, from (seed, step, task, member)
    cache: LayerKV  # per layer [B, G, R, K, H]


def empty_state(config: TextConfig, hidden: Array, keys: Array, room: int, alive: Array) -> RolloutState:
    """Lanes at the start of their first turn.

    Args:
      hidden: `[B, D]`, the last hidden state of each prefix.
      keys: uint32 `[B, G, 2]`.
      room: R, the most tokens a member may hold.
      alive: bool `[B]`: False for groups that only pad the batch.
    """
    b, g = keys.shape[:2]
    shape = (b, g, room, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_hidden_layers)
    zeros = jnp.zeros((b, g), jnp.int32)
    fresh = RolloutState(
        tokens=jnp.zeros((b, g, room), jnp.int32),
        logprobs=jnp.zeros((b, g, room), jnp.float32),
        authored=jnp.zeros((b, g, room), bool),
        length=zeros,
        turn=zeros,
        turn_start=zeros,
        lane=jnp.broadcast_to(jnp.where(alive, Lane.DECODING, Lane.DONE)[:, None], (b, g)).astype(jnp.int32),
        stop=zeros,
        automaton=zeros,
        hidden=jnp.broadcast_to(hidden[:, None], (b, g, hidden.shape[-1])),
        keys=keys,
        cache=LayerKV(
            [jnp.zeros(shape, hidden.dtype) for _ in layers], [jnp.zeros(shape, hidden.dtype) for _ in layers]
        ),
    )
    # Zeros depend on nothing that is sharded: without this every device would hold every lane.
    return jax.tree.map(keep_over_groups, fresh)
