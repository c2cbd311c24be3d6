"""The group-shaped policy against transformers on plain rows, and against itself under padding and decoding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.policy.attention.cascade import Assignment, LaneKV, View
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.rollout.decode import open_groups, prefill, write
from maestro_jax.rollout.state import Groups, RolloutSizes, empty_kv
from tests.policy import reference
from tests.policy.reference import ROOT, assert_near

# fp32 over three layers with sums of up to 1536 terms: about 1e-6 off; a wrong position, tap or mask is above 1e-2.
TOLERANCE = 1e-5
G, R = 3, 6
LENGTH = np.array([[6, 4, 1], [2, 6, 5], [6, 1, 3]], np.int32)
# For decoding: a lane for every member, in another order; no turns, no parking.
SIZES = RolloutSizes(
    shards=1,
    lanes=3 * G,
    groups=3,
    members=G,
    prefix=31,
    room=R,
    turn_budget=R,
    pages=0,
    append_rows=3 * G,
    prefill_groups=3,
)
MEMBER_SLOT = np.random.default_rng(2).permutation(3 * G).astype(np.int32)[None]


def encode(policy: Policy, batch: PrefixBatch, members: jax.Array, length: jax.Array) -> tuple[Any, ...]:
    """Logits behind prefixes `[B, V]`, states of members `[B, G, R, D]`, what members decode on, the logits again."""
    last, hidden = policy.encode_groups(batch, members, length)
    groups = prefill(policy, open_groups(policy, batch.root, SIZES), batch, jnp.arange(3)[None])
    return policy.logits(last), hidden, groups, policy.logits(groups.hidden[0])


jitted_encode = nnx.jit(encode)


@pytest.fixture(scope="module")
def batch() -> PrefixBatch:
    return reference.collate(ROOT, reference.three_rows(), width=24, per_group=2, patches=24)


@pytest.fixture(scope="module")
def encoded(policy: Policy, batch: PrefixBatch) -> tuple[Any, ...]:
    return jitted_encode(policy, batch, jnp.asarray(reference.members(3, G, R)), jnp.asarray(LENGTH))


@pytest.mark.parametrize("group", [0, 1, 2], ids=["no image", "one image", "two images"])
def test_group_form_equals_transformers_on_plain_rows(
    group: int, policy: Policy, encoded: tuple[Any, ...], hf_model: Any
) -> None:
    import torch

    first, hidden, _, first_of_prompts = encoded
    row = reference.three_rows()[group]
    start = len(ROOT) + len(row.ids)
    for member, length in enumerate(LENGTH[group]):
        tokens = reference.members(3, G, R)[group, member, :length]
        with torch.no_grad():
            wanted = reference.plain_logits(hf_model, ROOT, row, tokens).numpy()
        for found in (first, first_of_prompts):  # of the pass that trains, and of the one that decodes
            assert_near(found[group], wanted[start - 1], TOLERANCE, "prediction of the first member token")
        assert_near(policy.logits(hidden[group, member, :length]), wanted[start:], TOLERANCE, f"member {member}")


def test_padding_changes_nothing(policy: Policy, encoded: tuple[Any, ...]) -> None:
    """A wider bucket, more image slots, other tokens on padding: the same real rows."""
    wide = reference.collate(ROOT, reference.three_rows(), width=31, per_group=3, patches=40, filler=17)
    members = np.full((3, G, R + 3), 23, np.int32)
    members[..., :R] = np.where(np.arange(R) < LENGTH[..., None], reference.members(3, G, R), 99)
    first, hidden, *_ = jitted_encode(policy, wide, jnp.asarray(members), jnp.asarray(LENGTH))
    real = np.arange(R) < LENGTH[..., None]
    assert_near(first, encoded[0], TOLERANCE)
    assert_near(np.asarray(hidden)[:, :, :R][real], np.asarray(encoded[1])[real], TOLERANCE)


def test_a_group_does_not_see_its_neighbours(policy: Policy, encoded: tuple[Any, ...]) -> None:
    rows = reference.three_rows()
    turned = reference.collate(ROOT, [rows[2], rows[0], rows[1]], width=24, per_group=2, patches=24)
    order = np.array([2, 0, 1])
    members = jnp.asarray(reference.members(3, G, R)[order])
    first, hidden, *_ = jitted_encode(policy, turned, members, jnp.asarray(LENGTH[order]))
    real = (np.arange(R) < LENGTH[..., None])[order]
    assert_near(first, np.asarray(encoded[0])[order], TOLERANCE)
    assert_near(np.asarray(hidden)[real], np.asarray(encoded[1])[order][real], TOLERANCE)


def test_deepstack_reaches_the_logits(policy: Policy, batch: PrefixBatch) -> None:
    """Guards the parity test itself: without the taps it would have to fail, and only where images are."""
    graph, state = nnx.split(policy, nnx.Param)
    muted = nnx.merge(
        graph,
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * 0 if "deepstack_mergers" in jax.tree_util.keystr(path) else leaf, state
        ),
    )
    members, length = jnp.asarray(reference.members(3, G, R)), jnp.asarray(LENGTH)
    change = np.abs(jitted_encode(muted, batch, members, length)[0] - jitted_encode(policy, batch, members, length)[0])
    assert change[0].max() == 0.0 and change[1].max() > 1e-2 and change[2].max() > 1e-2


# ---- decoding ----------------------------------------------------------------------------------------------


def empty_cache(policy: Policy) -> LaneKV:
    text = policy.architecture.text
    return empty_kv((1, 3 * G, text.num_key_value_heads, R, text.head_dim), text, jnp.float32)


@nnx.jit
def jitted_extend(
    policy: Policy, groups: Groups, cache: LaneKV, length: jax.Array, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, LaneKV]:
    """Runs tokens `[1, S, T]` behind `length [1, S]` others and keeps the first `count [1, S]` of each lane."""
    text, width = policy.architecture.text, tokens.shape[-1]
    view = View.of_all(groups.shared, cache, length, Assignment.of(jnp.asarray(MEMBER_SLOT), 3, G))
    fresh = empty_kv((1, 3 * G, text.num_key_value_heads, width, text.head_dim), text, jnp.float32)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (*tokens.shape, width))
    steps = length[..., None] + jnp.arange(width)
    hidden, fresh = policy.for_decoding().extend(tokens, steps, view, fresh, 0, causal)
    return hidden, write(cache, jnp.arange(3 * G)[None], fresh, length, count)


def in_lanes(x: np.ndarray) -> np.ndarray:
    """Members `[3, G, ...]` as lanes `[S, ...]`."""
    return x.reshape(3 * G, *x.shape[2:])[MEMBER_SLOT[0]]


def test_extend_equals_encoding_at_once(policy: Policy, encoded: tuple[Any, ...]) -> None:
    """Chunks of three and single tokens; lanes start apart, stand still in between and end at different lengths."""
    tokens, length, wanted = (in_lanes(np.asarray(x)) for x in (reference.members(3, G, R), LENGTH, encoded[1]))
    hidden, cache = np.zeros(wanted.shape, np.float32), empty_cache(policy)
    filled = np.zeros(3 * G, np.int32)
    rng = np.random.default_rng(5)
    for width in [3, 1, 1, 3, 1, *[1] * 16]:
        most = np.minimum(length - filled, width)
        count = np.where(rng.random(3 * G) < 0.7, rng.integers(0, most + 1), 0)  # 0: the lane stands still
        steps = filled[:, None] + np.arange(width)
        chosen = np.take_along_axis(tokens, np.minimum(steps, R - 1), axis=-1)
        states, cache = jitted_extend(policy, encoded[2], cache, filled[None], chosen[None], count[None])
        for lane, n in enumerate(count):
            hidden[lane, filled[lane] : filled[lane] + n] = states[0, lane, :n]
        filled += count.astype(np.int32)
    assert (filled == length).all()
    real = np.arange(R) < length[:, None]
    assert_near(hidden[real], wanted[real], TOLERANCE)


def test_tokens_that_are_not_kept_leave_the_cache_alone(policy: Policy, encoded: tuple[Any, ...]) -> None:
    rng = np.random.default_rng(0)
    before = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), empty_cache(policy))
    nothing, tokens = np.zeros((1, 3 * G), np.int32), np.full((1, 3 * G, 3), 9)
    _, after = jitted_extend(policy, encoded[2], before, nothing, tokens, nothing)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
