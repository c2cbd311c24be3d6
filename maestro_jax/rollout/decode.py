"""The pure device programs of a rollout: prefill, decode a chunk of tokens, append observations.

No callback and no host value in here, so that every program is cacheable and donates its state.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maestro_jax.policy.model import DecodingPolicy, Policy, PrefixBatch
from maestro_jax.policy.text import Context
from maestro_jax.policy.vision import Leaf
from maestro_jax.rollout.state import Lane, RolloutState, empty_state
from maestro_jax.types import StopReason

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static settings of the decode program (lengths in tokens)."""

    decode_chunk: int  # most tokens per program call
    turn_budget: int  # most tokens the policy may write in one turn
    room: int  # most tokens a member may hold, observations included
    temperature: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopTables:
    """The stop automaton on the device."""

    transitions: Leaf  # int32 [states, V]
    reasons: Leaf  # int32 [states]
    end_of_turn: Leaf  # int32 []


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What a group's members continue: computed once per group (root: once per step)."""

    root: Context
    prefix: Context
    next_position: Array  # int32 [B]


def prefill(
    policy: Policy, prompts: PrefixBatch, keys: Array, alive: Array, room: int
) -> tuple[Prefilled, RolloutState]:
    """Encodes root, images and prefixes; returns them with fresh lanes.

    Args:
      keys: uint32 `[B, G, 2]`, random key data of every lane.
      alive: bool `[B]`, False for groups that only pad the batch.
      room: R.
    """
    (root, prefix), last = policy.encode_prompts(prompts)
    state = empty_state(policy.architecture.text, last, keys, room, alive)
    return Prefilled(root, prefix, prompts.next_position), state


def decode_chunk(
    policy: Policy,
    prefilled: Prefilled,
    state: RolloutState,
    tables: StopTables,
    noise: Array,
    config: DecodeConfig,
) -> RolloutState:
    """Samples up to `config.decode_chunk` tokens in every decoding lane; ends early when none decodes.

    Args:
      noise: float32 `[]`, 1 to sample, 0 for greedy decoding (one program serves both).
    """

    decoder = policy.for_decoding()

    def go_on(carry: tuple[Array, RolloutState]) -> Array:
        return (carry[0] < config.decode_chunk) & jnp.any(carry[1].lane == Lane.DECODING)

    def body(carry: tuple[Array, RolloutState]) -> tuple[Array, RolloutState]:
        return carry[0] + 1, decode_token(decoder, prefilled, carry[1], tables, noise, config)

    return jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), state))[1]


def decode_token(
    policy: DecodingPolicy,
    prefilled: Prefilled,
    state: RolloutState,
    tables: StopTables,
    noise: Array,
    config: DecodeConfig,
) -> RolloutState:
    """One token in every decoding lane; the others stand still."""
    active = state.lane == Lane.DECODING
    token, logprob = sample(policy.logits(state.hidden) / config.temperature, state, noise)
    slot = jnp.where(active, state.length, config.room)
    at = jnp.arange(slot.shape[0])[:, None], jnp.arange(slot.shape[1])[None, :], slot
    automaton = jnp.where(active, tables.transitions[state.automaton, token], state.automaton)
    length = state.length + active
    stop = _stop_reason(tables, automaton, token, length, state.turn_start, config)
    hidden, cache = policy.extend(
        token[..., None], slot[..., None], prefilled.next_position, (prefilled.root, prefilled.prefix), state.cache
    )
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[at].set(token, mode="drop"),
        logprobs=state.logprobs.at[at].set(logprob, mode="drop"),
        authored=state.authored.at[at].set(True, mode="drop"),
        length=length,
        automaton=automaton,
        stop=jnp.where(active, stop, state.stop),
        lane=jnp.where(active & (stop != StopReason.NONE), Lane.STOPPED, state.lane),
        hidden=jnp.where(active[..., None], hidden[:, :, 0], state.hidden),
        cache=cache,
    )


def sample(logits: Array, state: RolloutState, noise: Array) -> tuple[Array, Array]:
    """Tokens int32 `[B, G]` and their log-probabilities fp32 `[B, G]` under `logits [B, G, V]`.

    The randomness of a lane depends on its own key, turn and position only, so no result depends
    on which lanes run beside it or in which order experts answer.
    """

    def gumbel(key_data: Array, turn: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, turn), position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    drawn = jax.vmap(jax.vmap(gumbel))(state.keys, state.turn, state.length - state.turn_start)
    token = jnp.argmax(logits + noise * drawn, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _stop_reason(
    tables: StopTables, automaton: Array, token: Array, length: Array, turn_start: Array, config: DecodeConfig
) -> Array:
    """Why the turn ends after this token (`StopReason`, NONE if it goes on)."""
    reason = tables.reasons[automaton]
    out_of_budget = (length - turn_start >= config.turn_budget) | (length >= config.room)
    reason = jnp.where((reason == StopReason.NONE) & out_of_budget, StopReason.BUDGET, reason)
    return jnp.where(token == tables.end_of_turn, StopReason.END_OF_TURN, reason)


def append_observations(
    policy: Policy,
    prefilled: Prefilled,
    state: RolloutState,
    lane: Array,
    observation: Array,
    observation_length: Array,
) -> RolloutState:
    """Prefills observations behind the lanes that received one and starts their next turn.

    Args:
      lane: int32 `[B, G]`, the lanes' new state as the exchange decided it.
      observation: int32 `[B, G, O]`, padded on the right; observation tokens are not authored.
      observation_length: int32 `[B, G]`; 0 leaves the lane alone.
    """
    width = observation.shape[-1]
    steps = jnp.arange(width)
    arrived = observation_length > 0
    room = state.tokens.shape[-1]
    slots = jnp.where(steps < observation_length[..., None], state.length[..., None] + steps, room)
    hidden, cache = policy.for_decoding().extend(
        observation, slots, prefilled.next_position, (prefilled.root, prefilled.prefix), state.cache
    )
    last = jnp.maximum(observation_length - 1, 0)[..., None, None]
    last_hidden = jnp.take_along_axis(hidden, last, axis=2)[:, :, 0]
    b, g = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]
    length = state.length + observation_length
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[b, g, slots].set(observation, mode="drop"),
        length=length,
        turn=state.turn + arrived,
        turn_start=jnp.where(arrived, length, state.turn_start),
        automaton=jnp.where(arrived, 0, state.automaton),
        hidden=jnp.where(arrived[..., None], last_hidden, state.hidden),
        lane=lane,
        cache=cache,
    )
