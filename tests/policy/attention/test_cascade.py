"""Attention over caches against a plain softmax over everything that a lane sees, one lane and token at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.policy.attention.cascade import Assignment, LaneKV, Shared, View, attend_cached, put, take
from tests.policy.reference import assert_near

D, X, C = 2, 3, 4  # shards, groups, members of a group
S, T, N, K, H = 7, 3, 6, 2, 8  # lanes, new tokens, query heads, KV heads, head size
P0, P, R, W = 5, 6, 9, 4  # tokens of the root, prefixes, lanes, and fresh ones
FREE = X * C
# The members of a group stand apart. In the first shard two lanes are empty, and the second group has nobody.
MEMBER_SLOT = np.array([[11, FREE, 2, 8, 0, FREE, 3], [1, 4, 0, 3, 7, 2, 6]], np.int32)
TOLERANCE = 2e-6  # fp32, sums of some 25 terms of size one
# bf16 keeps 8 bits; queries, keys, weights and the result are rounded once each, sums are fp32.
BF16_TOLERANCE = 2e-2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What `attend_cached` takes, but for the assignment."""

    q: Any
    root: Any
    prefix: Any
    own: Any
    fresh: Any


def inputs(dtype: Any = jnp.float32, sharp: float = 1.0) -> Inputs:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    prefix_mask = np.arange(P) < rng.integers(1, P + 1, (D, X))[..., None]
    length = rng.integers(0, R + 1, (D, S))
    length[0, 2], length[1, 0] = 0, R  # nothing of its own yet, and a full cache
    causal = np.broadcast_to(np.tril(np.ones((T, W), bool), k=1), (D, S, T, W))
    return Inputs(
        q=normal(D, S, T, N, H) * sharp * H**-0.5,
        root=(normal(K, H, P0), normal(K, P0, H)),
        prefix=(normal(D, X, K, H, P), normal(D, X, K, P, H), jnp.asarray(prefix_mask)),
        own=(normal(D, S, K, R, H), normal(D, S, K, R, H), jnp.asarray(np.arange(R) < length[..., None])),
        fresh=(normal(D, S, K, W, H), normal(D, S, K, W, H), jnp.asarray(causal)),
    )


def plain(x: Inputs, group: np.ndarray) -> np.ndarray:
    """Softmax in fp64 over the concatenation of what lanes `[D, S]` of these groups see: `[D, S, T, N, H]`."""
    given = jax.tree.map(lambda a: np.asarray(a, np.float64 if a.dtype != bool else bool), dataclasses.asdict(x))
    found = np.zeros((*group.shape, T, N, H))
    for d, s, t, n in np.ndindex(*found.shape[:4]):
        k, g = n // (N // K), group[d, s]
        keys, values = [given["root"][0][k].T], [given["root"][1][k]]
        for (more_keys, more_values, mask), turned in (
            ([a[d, g] for a in given["prefix"]], True),
            ([a[d, s] for a in given["own"]], False),
            ([a[d, s] for a in given["fresh"]], False),
        ):
            seen = mask[t] if mask.ndim == 2 else mask
            keys.append((more_keys[k].T if turned else more_keys[k])[seen])
            values.append(more_values[k][seen])
        logits = np.concatenate(keys) @ given["q"][d, s, t, n]
        weights = np.exp(logits - logits.max())
        found[d, s, t, n] = weights @ np.concatenate(values) / weights.sum()
    return found


@jax.jit
def by_slot(x: Inputs, member_slot: jax.Array) -> jax.Array:
    return attend_cached(x.q, x.root, x.prefix, Assignment.of(member_slot, X, C), x.own, x.fresh)


@jax.jit
def by_lane(x: Inputs) -> jax.Array:
    prefix = tuple(take(a, GROUP) for a in x.prefix)
    return attend_cached(x.q, x.root, prefix, None, x.own, x.fresh)


HELD = MEMBER_SLOT < FREE
GROUP = np.where(HELD, MEMBER_SLOT // C, 0)


# ---- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharp", [1.0, 30.0])
def test_parts_are_one_softmax_over_all_that_a_lane_sees(sharp: float) -> None:
    x = inputs(sharp=sharp)
    found = np.asarray(by_slot(x, MEMBER_SLOT))
    assert np.isfinite(found).all()  # of empty lanes too
    assert_near(found[HELD], plain(x, GROUP)[HELD], TOLERANCE * sharp)  # logits are off by parts of their size


def test_bfloat16_is_rounded_and_nothing_else() -> None:
    x = inputs(jnp.bfloat16)
    found = by_slot(x, MEMBER_SLOT)
    assert found.dtype == jnp.bfloat16
    assert_near(np.asarray(found, np.float32)[HELD], plain(x, GROUP)[HELD], BF16_TOLERANCE)


def test_lanes_with_a_prefix_each() -> None:
    """What appending observations does: no assignment, lane s has prefix s."""

    x = inputs()
    assert_near(by_lane(x), plain(x, GROUP), TOLERANCE)


def test_a_lane_depends_on_no_other_and_on_no_place() -> None:
    x = inputs()
    wanted = by_slot(x, MEMBER_SLOT)
    louder = by_slot(dataclasses.replace(x, q=x.q.at[:, 5].multiply(3)), MEMBER_SLOT)
    np.testing.assert_array_equal(np.delete(louder, 5, axis=1), np.delete(wanted, 5, axis=1))
    order = np.random.default_rng(1).permutation(S)
    moved = Inputs(x.q[:, order], x.root, x.prefix, *(tuple(a[:, order] for a in part) for part in (x.own, x.fresh)))
    member_slot = np.where(order == 4, MEMBER_SLOT[:, order], FREE)  # alone
    np.testing.assert_array_equal(by_slot(moved, member_slot)[:, order == 4], wanted[:, 4:5])


# ---- who sits where ----------------------------------------------------------------------------------------


def test_lanes_sit_down_and_rise_again() -> None:
    assignment = Assignment.of(jnp.asarray(MEMBER_SLOT), X, C)
    for d, s in np.argwhere(HELD):
        assert assignment.lane[d, MEMBER_SLOT[d, s] // C, MEMBER_SLOT[d, s] % C] == s
    assert (np.asarray(assignment.lane) < S).sum() == HELD.sum()
    np.testing.assert_array_equal(assignment.group(), GROUP)
    x = 1 + np.arange(D * S * 2, dtype=np.float32).reshape(D, S, 2)
    by_member = assignment.to_members(jnp.asarray(x))
    assert not np.asarray(by_member)[np.asarray(assignment.lane) == S].any()
    np.testing.assert_array_equal(np.asarray(assignment.to_lanes(by_member))[HELD], x[HELD])


def test_rows_are_taken_and_put_shard_by_shard() -> None:
    x, at = np.arange(D * S * 2).reshape(D, S, 2), np.array([[6, 0, S], [3, S, 1]])
    taken = np.asarray(take(jnp.asarray(x), jnp.asarray(at)))
    np.testing.assert_array_equal(taken, np.stack([x[d, np.minimum(at[d], S - 1)] for d in range(D)]))
    found = np.asarray(put(jnp.asarray(x), jnp.asarray(at), -jnp.ones((D, 3, 2), jnp.int32)))
    x[0, [6, 0]] = x[1, [3, 1]] = -1
    np.testing.assert_array_equal(found, x)


# ---- views -------------------------------------------------------------------------------------------------


FEW = np.array([[6, 2, S], [0, S, 5]])  # S: no lane
POSITIONS = 10 + np.arange(D * X).reshape(D, X)


@jax.jit
def views(x: Inputs) -> tuple[jax.Array, ...]:
    """Attention of all lanes and of a few, each with the positions and lengths that it goes by; layer 1 of two."""
    empty, length = jnp.zeros((D, S, K, R, H)), jnp.sum(x.own[2], axis=-1)
    shared = Shared(
        *([empty, leaf] for leaf in (*x.root, *x.prefix[:2])), mask=x.prefix[2], next_position=jnp.asarray(POSITIONS)
    )
    cache, assignment = LaneKV([empty, x.own[0]], [empty, x.own[1]]), Assignment.of(jnp.asarray(MEMBER_SLOT), X, C)
    everyone = View.of_all(shared, cache, length, assignment)
    few = View.of_few(shared, cache, length, assignment, jnp.asarray(FEW))
    found = everyone.attend(1, x.q, x.fresh), everyone.next_position(), everyone.length
    fresh = tuple(take(a, FEW) for a in x.fresh)
    return *found, few.attend(1, take(x.q, FEW), fresh), few.next_position(), few.length


def test_a_few_lanes_see_what_they_see_among_all() -> None:
    x = inputs()
    attended, positions, length, *of_few = (np.asarray(a) for a in views(x))
    assert_near(attended[HELD], plain(x, GROUP)[HELD], TOLERANCE)
    np.testing.assert_array_equal(positions, np.take_along_axis(POSITIONS, GROUP, axis=1))
    at = np.arange(D)[:, None], np.minimum(FEW, S - 1)
    assert_near(of_few[0], attended[at], TOLERANCE)
    np.testing.assert_array_equal(of_few[1], positions[at])
    np.testing.assert_array_equal(of_few[2], length[at])


@pytest.mark.parametrize("left_behind", [np.nan, np.inf])
def test_nothing_that_masks_hide_is_multiplied(left_behind: float) -> None:
    """Slots behind a lane's length, of padding, of lanes without a trajectory: a weight of zero times NaN is NaN."""
    x = inputs()
    keys, values, mask = x.fresh
    x = dataclasses.replace(x, fresh=(keys, values, mask.at[..., -1].set(False)))

    def spoilt(part: Any, seen: Any) -> Any:
        return *(jnp.where(seen[:, :, None, :, None], a, left_behind) for a in part[:2]), part[2]

    keys, values, mask = x.prefix
    left = Inputs(
        q=jnp.where(HELD[:, :, None, None, None], x.q, left_behind),
        root=x.root,
        prefix=(jnp.where(mask[:, :, None, None], keys, left_behind), values, mask),  # values: rollout/test_decode.py
        own=spoilt(x.own, x.own[2]),
        fresh=spoilt(x.fresh, x.fresh[2].any(2)),
    )
    assert all(not np.isfinite(a).all() for a in (left.q, left.prefix[0], *left.own[:2], *left.fresh[:2]))
    held = HELD, np.take_along_axis(HELD, np.minimum(FEW, S - 1), axis=1)
    for found, wanted, lanes in zip(views(left)[::3], views(x)[::3], held, strict=True):
        np.testing.assert_array_equal(np.asarray(found)[lanes], np.asarray(wanted)[lanes])
