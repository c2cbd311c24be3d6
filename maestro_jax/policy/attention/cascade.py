"""Attention of decoding: new tokens over everything that was computed before them, nothing of it repeated.

What lanes attend to stands in four places: the root (once for all), prefixes (once per group), each lane's own
cache, and the fresh tokens of the running program. The members of a group are rows of one matmul over their prefix
(cascade attention). Each place is a part of the softmax (`merge.py`). Nothing here is differentiated.

Slots that nobody sees may hold what an earlier trajectory left behind. Scores of its keys are replaced
(`merge.masked`), but its values would be multiplied by weights of zero, and zero times NaN is NaN. So values are
selected first (`_seen`): prefixes' when they are stored (`rollout/decode.py: prefill`), lanes' own when a program
begins (a token at a time it would copy the cache), fresh ones where they are used.

Letters: d shards, s lanes, x groups, c columns of a group, k KV heads, q queries of a KV head, h head size.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maestro_jax.policy.attention.merge import Pair, masked, merge, softmaxed

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneKV:
    """Keys and values per decoder layer, a list per layer (a stacked cache would be copied at each)."""

    keys: list[Array]  # L x [D, S, K, R, H]
    values: list[Array]  # L x [D, S, K, R, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """What several lanes attend to. Keys stand with their tokens last, so that logits are plain matmuls.

    Attributes:
      root_keys, root_values: L x `[K, H, P0]` and L x `[K, P0, H]`.
      keys, values: L x `[D, B, K, H, P]` and L x `[D, B, K, P, H]`, of the prefixes.
      mask: bool `[D, B, P]`, True on real tokens of a prefix.
      next_position: int32 `[D, B]`, position of a member's first token.
    """

    root_keys: list[Array]
    root_values: list[Array]
    keys: list[Array]
    values: list[Array]
    mask: Array
    next_position: Array


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which lanes decode which members of groups: lane → member slot `x * C + c`, and back.

    Attributes:
      member_slot: int32 `[D, S]`; lanes without a trajectory have X C.
      lane: int32 `[D, X, C]`; member slots without a lane have S.
    """

    member_slot: Array
    lane: Array

    @classmethod
    def of(cls, member_slot: Array, groups: int, columns: int) -> "Assignment":
        lanes = member_slot.shape[1]

        def invert(member_slot: Array) -> Array:
            free = jnp.full((groups * columns,), lanes, jnp.int32)
            return free.at[member_slot].set(jnp.arange(lanes, dtype=jnp.int32), mode="drop")

        return cls(member_slot, jax.vmap(invert)(member_slot).reshape(-1, groups, columns))

    def group(self) -> Array:
        """The group of each lane `[D, S]`, 0 for lanes without a trajectory."""
        groups, columns = self.lane.shape[1:]
        return jnp.where(self.member_slot < groups * columns, self.member_slot // columns, 0)

    def to_members(self, x: Array) -> Array:
        """`[D, S, ...]` → `[D, X, C, ...]`, zeros where no lane is."""
        return jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))(x, self.lane)

    def to_lanes(self, x: Array) -> Array:
        """`[D, X, C, ...]` → `[D, S, ...]`."""
        flat = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jax.vmap(lambda rows, at: rows.at[at].get(mode="clip"))(flat, self.member_slot)


@dataclasses.dataclass(frozen=True)
class View:
    """What the lanes of a program see, layer by layer: all lanes, or a few of them taken out.

    Attributes:
      cache: with zeros for values that no lane sees, where it is about all lanes; write to this one.
      assignment: who shares a prefix; None where each lane's prefix is taken out for it.
      lanes: int32 `[D, A]`, which lanes the program is about; None for all of them.
      length: int32 `[D, S]`, tokens in each lane's cache.
    """

    shared: Shared
    cache: LaneKV
    length: Array
    assignment: Assignment | None
    lanes: Array | None
    group: Array  # int32 [D, S], of each lane of the program

    @classmethod
    def of_all(cls, shared: Shared, cache: LaneKV, length: Array, assignment: Assignment) -> "View":
        seen = jnp.arange(cache.values[0].shape[3]) < length[..., None]
        cache = LaneKV(cache.keys, [_seen(values, seen) for values in cache.values])
        return cls(shared, cache, length, assignment, None, assignment.group())

    @classmethod
    def of_few(cls, shared: Shared, cache: LaneKV, length: Array, assignment: Assignment, lanes: Array) -> "View":
        """Of lanes `[D, A]`; their caches and prefixes are copied, which is little beside all lanes' work."""
        return cls(shared, cache, take(length, lanes), None, lanes, take(assignment.group(), lanes))

    def next_position(self) -> Array:
        """Position of the first member token of each lane `[D, S]`."""
        return take(self.shared.next_position, self.group)

    def attend(self, layer: int, q: Array, fresh: tuple[Array, Array, Array]) -> Array:
        """`attend_cached` over what layer number `layer` has kept."""
        shared = self.shared
        root = shared.root_keys[layer], shared.root_values[layer]
        prefix = shared.keys[layer], shared.values[layer], shared.mask
        own = self.cache.keys[layer], self.cache.values[layer]
        mask = jnp.arange(own[0].shape[3]) < self.length[..., None]
        if self.lanes is not None:
            prefix = take(prefix[0], self.group), take(prefix[1], self.group), take(prefix[2], self.group)
            own = take(own[0], self.lanes), _seen(take(own[1], self.lanes), mask)
        return attend_cached(q, root, prefix, self.assignment, (*own, mask), fresh)


def take(x: Array, at: Array) -> Array:
    """Rows `at [D, A]` (or `[D, A, n]`) of `x [D, S, ...]`, shard by shard; one beyond the last takes the last."""
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="clip"))(x, at)


def put(x: Array, at: Array, rows: Array) -> Array:
    """`x [D, S, ...]` with `rows [D, A, ...]` at `at [D, A]` (or `[D, A, n]`); one beyond the last is dropped."""
    return jax.vmap(lambda all_rows, i, new: all_rows.at[i].set(new.astype(all_rows.dtype), mode="drop"))(x, at, rows)


def attend_cached(
    q: Array,
    root: tuple[Array, Array],
    prefix: tuple[Array, Array, Array],
    assignment: Assignment | None,
    own: tuple[Array, Array, Array],
    fresh: tuple[Array, Array, Array],
) -> Array:
    """Softmax attention of new tokens over root, prefix, own cache and fresh tokens, for one layer.

    Args:
      q: `[D, S, T, N, H]`, scaled.
      root: keys `[K, H, P0]` and values `[K, P0, H]`.
      prefix: keys `[D, X, K, H, P]`, values `[D, X, K, P, H]` (finite where nobody sees them), mask `[D, X, P]`.
      assignment: which lanes share a prefix; None where lane s has the prefix x = s to itself.
      own: keys and values `[D, S, K, R, H]` (likewise), mask `[D, S, R]`.
      fresh: keys and values `[D, S, K, W, H]` (anything where no token of the lane sees them), mask `[D, S, T, W]`.

    Returns:
      `[D, S, T, N, H]` in the dtype of the queries; softmax in fp32.
    """
    d, s, t, n, h = q.shape
    kv = own[0].shape[2]
    repeats = n // kv
    rows = jnp.moveaxis(q.reshape(d, s, t, kv, repeats, h), 3, 2).reshape(d, s, kv, t * repeats, h)
    keys, values, mask = own
    parts = [_over_root(rows, *root), _over_prefix(rows, *prefix, assignment)]
    parts.append(_over_lanes(rows, keys, values, mask[:, :, None]))
    keys, values, mask = fresh
    parts.append(_over_lanes(rows, keys, _seen(values, jnp.any(mask, axis=2)), jnp.repeat(mask, repeats, axis=2)))
    merged = merge(parts)[0].reshape(d, s, kv, t, repeats, h)
    return jnp.moveaxis(merged, 2, 3).reshape(d, s, t, n, h).astype(q.dtype)


def _over_root(rows: Array, keys: Array, values: Array) -> Pair:
    """One matmul per KV head for all lanes."""
    d, s, k, q, h = rows.shape
    flat = jnp.moveaxis(rows, 2, 0).reshape(k, d * s * q, h)  # XLA for CPUs multiplies bf16 with the heads first only
    out, lse = softmaxed(_scores("kmh,khp->kmp", flat, keys), values)
    return jnp.moveaxis(out.reshape(k, d, s, q, h), 0, 2), jnp.moveaxis(lse.reshape(k, d, s, q), 0, 2)


def _over_prefix(rows: Array, keys: Array, values: Array, mask: Array, assignment: Assignment | None) -> Pair:
    """One matmul per group and KV head for all members of a group."""
    of_members = rows[:, :, None] if assignment is None else assignment.to_members(rows)
    d, x, c, k, q, h = of_members.shape
    flat = jnp.moveaxis(of_members, 3, 2).reshape(d, x, k, c * q, h)
    scores = masked(_scores("dxkmh,dxkhp->dxkmp", flat, keys), mask[:, :, None, None, :])

    def back(a: Array) -> Array:
        a = jnp.moveaxis(a.reshape(d, x, k, c, q, *a.shape[4:]), 2, 3)
        return a[:, :, 0] if assignment is None else assignment.to_lanes(a)

    out, lse = softmaxed(scores, values)
    return back(out), back(lse)


def _over_lanes(rows: Array, keys: Array, values: Array, mask: Array) -> Pair:
    """Over slots of the lane's own; `mask [D, S, 1 or queries, slots]`."""
    return softmaxed(masked(_scores("dskqh,dskph->dskqp", rows, keys), mask[:, :, None]), values)


def _seen(values: Array, mask: Array) -> Array:
    """`values [D, ., K, slots, H]` with zeros in slots that nobody sees, by `mask [D, ., slots]`."""
    return jnp.where(mask[:, :, None, :, None], values, 0)


def _scores(letters: str, rows: Array, keys: Array) -> Array:
    return jnp.einsum(letters, rows, keys, preferred_element_type=jnp.float32)
