"""The pure device programs that run the policy: root, prefixes, chunks of tokens, observations.

No callback and no host value in here, so that every program is cacheable and donates what it changes. What stands
in caches is only read while tokens are decoded; the new keys and values join it when a program ends.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maestro_jax.parallel.sharding import keep_over_heads
from maestro_jax.policy.attention.cascade import Assignment, LaneKV, Shared, View, put, take
from maestro_jax.policy.model import DecodingPolicy, Policy, PrefixBatch
from maestro_jax.policy.text import Context, LayerKV
from maestro_jax.policy.vision import Leaf
from maestro_jax.rollout.sampling import sample
from maestro_jax.rollout.state import Groups, Lane, Lanes, RolloutSizes, empty_groups
from maestro_jax.types import StopReason

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static settings of the decode program."""

    chunk: int  # tokens per program call
    temperature: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopTables:
    """The stop automaton on the device."""

    transitions: Leaf  # int32 [states, V]
    reasons: Leaf  # int32 [states]
    end_of_turn: Leaf  # int32 []


# ---- what members continue -----------------------------------------------------------------------------------


def open_groups(policy: Policy, root: Array, sizes: RolloutSizes) -> Groups:
    """The encoded root `[P0]` with room for prefixes."""
    return with_root(policy, empty_groups(sizes, policy.architecture.text, policy.compute_dtype), root)


def with_root(policy: Policy, groups: Groups, root: Array) -> Groups:
    """The same prefixes behind a root of this policy: what running trajectories see once the policy has changed."""
    kv = policy.encode_root(root).kv
    keys = [keep_over_heads(jnp.transpose(x, (1, 2, 0)), axis=0) for x in kv.keys]
    values = [keep_over_heads(jnp.swapaxes(x, 0, 1), axis=0) for x in kv.values]
    return dataclasses.replace(groups, shared=dataclasses.replace(groups.shared, root_keys=keys, root_values=values))


def prefill(policy: Policy, groups: Groups, prompts: PrefixBatch, slots: Array) -> Groups:
    """Encodes prefixes, each once whatever continues it.

    Args:
      prompts: of D b groups; their prefixes may be shorter than the P of `groups`.
      slots: int32 `[D, b]`, where they go; B leaves one out.
    """
    shared = groups.shared
    root = LayerKV(
        [jnp.transpose(x, (2, 0, 1)) for x in shared.root_keys], [jnp.swapaxes(x, 0, 1) for x in shared.root_values]
    )
    prefix, last = policy.encode_prompts(prompts, Context(root, jnp.ones(prompts.root.shape, bool)))

    def by_shard(x: Array) -> Array:
        return x.reshape(*slots.shape, *x.shape[1:])

    def pad(x: Array, axis: int) -> Array:
        """The prefix's tokens, filled up to P."""
        missing = shared.mask.shape[-1] - x.shape[axis]
        return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    keys = [pad(jnp.transpose(by_shard(x), (0, 1, 3, 4, 2)), 4) for x in prefix.kv.keys]
    # Nobody sees the values of padding, but they are multiplied by weights of zero: nothing may stand there.
    real = by_shard(prefix.mask)[:, :, None, :, None]
    values = [pad(jnp.where(real, jnp.swapaxes(by_shard(x), 2, 3), 0), 3) for x in prefix.kv.values]
    return Groups(
        Shared(
            shared.root_keys,
            shared.root_values,
            [put(x, slots, new) for x, new in zip(shared.keys, keys, strict=True)],
            [put(x, slots, new) for x, new in zip(shared.values, values, strict=True)],
            put(shared.mask, slots, pad(by_shard(prefix.mask), 2)),
            put(shared.next_position, slots, by_shard(prompts.next_position)),
        ),
        put(groups.hidden, slots, by_shard(last)),
    )


# ---- decoding ------------------------------------------------------------------------------------------------


def decode_chunk(
    decoder: DecodingPolicy,
    groups: Groups,
    lanes: Lanes,
    tables: StopTables,
    noise: Array,
    sizes: RolloutSizes,
    config: DecodeConfig,
) -> Lanes:
    """Samples `config.chunk` tokens in every decoding lane, or as many as it takes until none decodes.

    A lane that goes on decoding always gets the whole chunk, whatever its neighbours do: where chunks begin and end
    in a turn, and so the rounding of its numbers, depends on the lane alone.

    Args:
      noise: float32 `[]`, 1 to sample, 0 for greedy decoding.
    """
    assignment = Assignment.of(lanes.member_slot, sizes.groups, sizes.members)
    view = View.of_all(groups.shared, lanes.cache, lanes.length, assignment)
    room = jnp.minimum(sizes.room - lanes.length + lanes.written, sizes.turn_budget)  # most tokens of this turn

    def go_on(carry: tuple[Array, Lanes, LaneKV]) -> Array:
        return (carry[0] < config.chunk) & jnp.any(carry[1].status == Lane.DECODING)

    def body(carry: tuple[Array, Lanes, LaneKV]) -> tuple[Array, Lanes, LaneKV]:
        step, now, fresh = carry
        token, now = _next_token(decoder, now, tables, noise, room, config.temperature)
        seen = jnp.broadcast_to(jnp.arange(config.chunk) <= step, (*token.shape, 1, config.chunk))
        steps = (lanes.length + step)[..., None]
        hidden, fresh = decoder.extend(token[..., None], steps, view, fresh, step, seen)
        # A lane that has stopped keeps its last state; nobody reads it before it is replaced.
        return step + 1, dataclasses.replace(now, hidden=hidden[:, :, 0]), fresh

    # Between two chunks there is an exchange, which has seen what stopped in the first.
    status = jnp.where(lanes.status == Lane.STOPPED, Lane.WAITING, lanes.status)
    # The caches stay outside the loop: what it only reads, it cannot copy.
    start = dataclasses.replace(lanes, status=status, cache=LaneKV([], []))
    fresh = room_for_fresh(lanes.cache, sizes.lanes, config.chunk)
    _, end, fresh = jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), start, fresh))
    added = end.written - lanes.written
    everywhere = jnp.broadcast_to(jnp.arange(sizes.lanes), lanes.member_slot.shape)
    cache = write(view.cache, everywhere, fresh, lanes.length, added)
    return dataclasses.replace(end, length=lanes.length + added, cache=cache)


def _next_token(
    decoder: DecodingPolicy, now: Lanes, tables: StopTables, noise: Array, room: Array, temperature: float
) -> tuple[Array, Lanes]:
    """Draws a token in every decoding lane and says whether the turn ends with it; the others stand still."""
    active = now.status == Lane.DECODING
    token, logprob = sample(decoder.logits(now.hidden), now.keys, now.turn, now.written, noise, temperature)
    here = active[..., None] & (jnp.arange(now.tokens.shape[-1]) == now.written[..., None])
    automaton = jnp.where(active, tables.transitions[now.automaton, token], now.automaton)
    written = now.written + active
    stop = _stop_reason(tables, automaton, token, written >= room)
    return token, dataclasses.replace(
        now,
        tokens=jnp.where(here, token[..., None], now.tokens),
        logprobs=jnp.where(here, logprob[..., None], now.logprobs),
        written=written,
        automaton=automaton,
        stop=jnp.where(active, stop, now.stop),
        status=jnp.where(active & (stop != StopReason.NONE), Lane.STOPPED, now.status),
    )


def _stop_reason(tables: StopTables, automaton: Array, token: Array, out_of_budget: Array) -> Array:
    """Why the turn ends after this token (`StopReason`, NONE if it goes on)."""
    reason = tables.reasons[automaton]
    reason = jnp.where((reason == StopReason.NONE) & out_of_budget, StopReason.BUDGET, reason)
    return jnp.where(token == tables.end_of_turn, StopReason.END_OF_TURN, reason)


# ---- observations --------------------------------------------------------------------------------------------


def append_observations(
    decoder: DecodingPolicy,
    groups: Groups,
    lanes: Lanes,
    at: Array,
    observation: Array,
    observation_length: Array,
    sizes: RolloutSizes,
) -> Lanes:
    """Prefills observations behind a few lanes and starts their next turn.

    Always the same number of rows, so that the rounding of a trajectory's numbers does not depend on how many
    experts answered at the same time.

    Args:
      at: int32 `[D, A]`, lanes; S for a row that has none.
      observation: int32 `[D, A, O]`, padded on the right.
      observation_length: int32 `[D, A]`.
    """
    width = observation.shape[-1]
    assignment = Assignment.of(lanes.member_slot, sizes.groups, sizes.members)
    view = View.of_few(groups.shared, lanes.cache, lanes.length, assignment, at)
    steps = view.length[..., None] + jnp.arange(width)
    fresh = room_for_fresh(lanes.cache, at.shape[1], width)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (*at.shape, width, width))
    hidden, fresh = decoder.extend(observation, steps, view, fresh, 0, causal)
    last = jnp.maximum(observation_length - 1, 0)[..., None, None]
    zeros, decoding = jnp.zeros_like(at), jnp.full_like(at, Lane.DECODING)
    return dataclasses.replace(
        lanes,
        status=put(lanes.status, at, decoding),
        written=put(lanes.written, at, zeros),
        length=put(lanes.length, at, view.length + observation_length),
        turn=put(lanes.turn, at, take(lanes.turn, at) + 1),
        automaton=put(lanes.automaton, at, zeros),
        hidden=put(lanes.hidden, at, jnp.take_along_axis(hidden, last, axis=2)[:, :, 0]),
        cache=write(lanes.cache, at, fresh, view.length, observation_length),
    )


def room_for_fresh(cache: LaneKV, lanes: int, width: int) -> LaneKV:
    """Keys and values `[D, A, K, W, H]` per layer, for W new tokens in each of A lanes."""
    return jax.tree.map(lambda x: jnp.zeros((x.shape[0], lanes, x.shape[2], width, x.shape[4]), x.dtype), cache)


def write(cache: LaneKV, at: Array, fresh: LaneKV, start: Array, count: Array) -> LaneKV:
    """Fresh keys and values `[D, A, K, W, H]`, the first `count [D, A]` of each row, into lanes from `start [D, A]`."""
    room, width = cache.keys[0].shape[3], fresh.keys[0].shape[3]
    slots = jnp.where(jnp.arange(width) < count[..., None], start[..., None] + jnp.arange(width), room)

    def one(x: Array, new: Array) -> Array:
        def of_shard(x: Array, at: Array, slots: Array, new: Array) -> Array:
            return x.at[at[:, None, None], jnp.arange(x.shape[1])[:, None], slots[:, None]].set(new, mode="drop")

        return jax.vmap(of_shard)(x, at, slots, new)

    return LaneKV(
        [one(x, new) for x, new in zip(cache.keys, fresh.keys, strict=True)],
        [one(x, new) for x, new in zip(cache.values, fresh.values, strict=True)],
    )
