"""The head in pieces of the vocabulary against one log-softmax over everything, forward and backward."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maestro_jax.grpo.logprobs import ROW_QUARTERS, loss_rows, put_rows, states_before, take_rows, token_logprobs
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import over_groups
from tests.policy.reference import assert_near

B, M, D, V = 4, 6, 8, 50
TEMPERATURE = 0.7
Pair = tuple[jax.Array, jax.Array]
Head = Callable[[jax.Array, jax.Array, jax.Array], Pair]
ENTROPY_SLOPES = {"entropy differentiated": 1.0, "entropy reported": 0.0}


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
    """Hidden states, table, targets; of the slopes `[2, B, M]` some rows have none, as rows that only pad."""
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((B, M, D)), rng.standard_normal((V, D))
    slopes = rng.standard_normal((2, B, M)) * (rng.random((B, M)) < 0.7)
    return (*(jnp.asarray(x, jnp.float32) for x in (hidden, table)), jnp.asarray(rng.integers(0, V, (B, M))), slopes)


def at_once(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> Pair:
    logprobs = jax.nn.log_softmax(jnp.einsum("bmd,vd->bmv", hidden, table) / TEMPERATURE, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def in_pieces(chunk: int) -> Head:
    return lambda hidden, table, targets: token_logprobs(hidden, table, targets, TEMPERATURE, chunk)


def gradients(head: Head, inputs: tuple[jax.Array, ...], entropy_slope: float) -> Pair:
    hidden, table, targets, slopes = inputs

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        logprobs, entropy = head(hidden, table, targets)
        bonus = jnp.sum(slopes[1] * entropy) if entropy_slope else 0.0
        return jnp.sum(slopes[0] * logprobs) + entropy_slope * bonus

    return jax.grad(total, argnums=(0, 1))(hidden, table)


# 1 entry at a time, pieces that leave a rest, that divide V, all at once, more than there are.
@pytest.mark.parametrize("chunk", [1, 7, 25, 50, 64])
@pytest.mark.parametrize("entropy_slope", ENTROPY_SLOPES.values(), ids=ENTROPY_SLOPES)
def test_log_softmax_and_entropy_with_their_gradients(
    chunk: int, entropy_slope: float, inputs: tuple[jax.Array, ...]
) -> None:
    found, wanted = in_pieces(chunk)(*inputs[:3]), at_once(*inputs[:3])
    for name, ours, theirs in zip(("log-probabilities", "entropies"), found, wanted, strict=True):
        assert_near(ours, theirs, 1e-6, name)  # fp32, sums over 50 logits
    slopes = gradients(in_pieces(chunk), inputs, entropy_slope), gradients(at_once, inputs, entropy_slope)
    for name, ours, theirs in zip(("hidden", "table"), *slopes, strict=True):
        assert_near(ours, theirs, 1e-5, name)


def test_logits_far_apart_neither_overflow_nor_vanish(inputs: tuple[jax.Array, ...]) -> None:
    """Differences of logits up to some hundreds, in either order of the pieces, where exp alone gives inf or 0."""
    hidden, table, targets, slopes = inputs
    for order in (slice(None), slice(None, None, -1)):
        steep = (20 * hidden, table[order] * jnp.linspace(1, 10, V)[:, None], targets, slopes)
        assert jnp.ptp(jnp.einsum("bmd,vd->bmv", *steep[:2])) > 1000
        (logprobs, entropy), wanted = in_pieces(7)(*steep[:3]), at_once(*steep[:3])
        assert_near(logprobs, wanted[0], 1e-6)
        np.testing.assert_allclose(entropy, wanted[1], atol=1e-3)  # near 0, of logits that are known to 1e-4
        for ours, theirs in zip(gradients(in_pieces(7), steep, 1.0), gradients(at_once, steep, 1.0), strict=True):
            assert_near(ours, theirs, 3e-4)  # so are, as a fraction, probabilities


def test_bfloat16_gradients_have_the_rounding_of_their_terms_and_of_their_sum() -> None:
    """Against the same rounded numbers in fp32: bf16 rounds each logit's slope and each sum by 2^-8 at most."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.standard_normal((4, 64, 96)), jnp.bfloat16)
    table = jnp.asarray(rng.standard_normal((70, 96)) * 96**-0.5, jnp.bfloat16)
    targets, slopes = jnp.asarray(rng.integers(0, 70, (4, 64))), rng.standard_normal((2, 4, 64)).astype(np.float32)
    h, w = hidden.astype(jnp.float32), table.astype(jnp.float32)
    for ours, theirs in zip(in_pieces(24)(hidden, table, targets), at_once(h, w, targets), strict=True):
        assert ours.dtype == jnp.float32
        assert_near(ours, theirs, 1e-6)
    found = gradients(in_pieces(24), (hidden, table, targets, slopes), 1.0)
    wanted = gradients(at_once, (h, w, targets, slopes), 1.0)

    identity = jnp.eye(70)  # as a table, it gives the slopes of the logits
    of_logits = gradients(at_once, (jnp.einsum("bmd,vd->bmv", h, w), identity, targets, slopes), 1.0)[0]
    terms = (
        jnp.einsum("bmv,vd->bmd", jnp.abs(of_logits), jnp.abs(w)),
        jnp.einsum("bmv,bmd->vd", jnp.abs(of_logits), jnp.abs(h)),
    )
    for ours, theirs, size in zip(found, wanted, terms, strict=True):
        assert ours.dtype == jnp.bfloat16
        excess = jnp.abs(ours.astype(jnp.float32) - theirs) - 2**-8 * (size + jnp.abs(theirs))
        assert excess.max() <= 1e-4 * jnp.abs(theirs).max()  # both roundings on top of each other, and fp32's


def test_bfloat16_is_never_summed() -> None:
    """A sum kept in bf16 over pieces or rows loses what is below one part in 2^9 of it."""
    hidden, table = jnp.ones((2, 4, 16), jnp.bfloat16), jnp.ones((90, 16), jnp.bfloat16)

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return sum(map(jnp.sum, in_pieces(20)(hidden, table, jnp.zeros((2, 4), int))))  # type: ignore[arg-type]

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, table))
    assert "dot_general" in text
    assert re.findall(r"bf16\[[\d,]*\] = (?:dot_general|add\w*|reduce_sum|cumsum)\b", text) == []


# ---- what is held in memory --------------------------------------------------------------------------------


def test_no_array_is_larger_than_the_logits_of_a_piece() -> None:
    """Every array of the program, in either pass, by its last two axes; V alone is as wide as the table."""
    hidden, table = jax.ShapeDtypeStruct((2, 32, 16), jnp.float32), jax.ShapeDtypeStruct((4096, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, 32), jnp.int32)

    def total(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        return sum(jnp.sum(x) for x in token_logprobs(hidden, table, targets, 1.0, 100))  # type: ignore[return-value]

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, table, targets).compile().as_text()
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    largest = max(np.prod([d for d in dims if d != 1]) for dims in sizes if not {4096, 16} <= {*dims})
    assert largest == 2 * 32 * 100


def test_a_frozen_table_costs_neither_product_nor_array() -> None:
    hidden, table = jnp.ones((2, 4, 16)), jnp.ones((96, 16))

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.sum(token_logprobs(hidden, table, jnp.zeros((2, 4), jnp.int32), 1.0, 32)[0])

    def products(argnums: Any) -> int:
        return jax.jit(jax.grad(total, argnums)).lower(hidden, table).compile().as_text().count(" dot(")

    assert products(0) == products((0, 1)) - 1


# ---- on a mesh ---------------------------------------------------------------------------------------------


MESHES = {"data 2, fsdp 2, tensor 2": (2, 2, 2), "fsdp 8": (1, 8, 1), "fsdp 2, tensor 4": (1, 2, 4)}
ON_MESH = (8, 12, 16, 176)  # B, M, D, V


def on_mesh(mesh: Mesh) -> tuple[Any, tuple[jax.Array, ...]]:
    """A program that gives gradients and values, everything sharded as in the train step, and its arguments."""
    rng, (b, m, d, v) = np.random.default_rng(2), ON_MESH
    groups, shards = over_groups(mesh), NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    hidden = jax.device_put(rng.standard_normal((b, m, d)).astype(np.float32), groups)
    table = jax.device_put(rng.standard_normal((v, d)).astype(np.float32), shards)
    targets, slopes = jax.device_put((rng.integers(0, v, (b, m)), rng.standard_normal((b, m))), groups)

    def total(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, Pair]:
        logprobs, entropy = token_logprobs(hidden, table, targets, TEMPERATURE, 20)
        return jnp.sum(slopes * (logprobs + 0.3 * entropy)), (logprobs, entropy)

    program = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), out_shardings=((groups, shards), (groups, groups)))
    with jax.set_mesh(mesh):
        return program.lower(hidden, table).compile(), (hidden, table)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_mesh_computes_what_one_device_does(axes: tuple[int, int, int]) -> None:
    alone, arguments = on_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    wanted = jax.tree.leaves(alone(*arguments))
    spread, arguments = on_mesh(make_mesh(MeshConfig(*axes)))
    for ours, theirs in zip(jax.tree.leaves(spread(*arguments)), wanted, strict=True):
        assert_near(ours, theirs, 1e-5)  # sums are split over devices; a missing collective is off by parts of one


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_only_the_table_is_gathered(axes: tuple[int, int, int]) -> None:
    """Neither logits nor states cross the batch axes, and logits no axis at all."""
    b, m, d, v = ON_MESH
    text = on_mesh(make_mesh(MeshConfig(*axes)))[0].as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    assert {*gathered} == {f"{v // axes[2]},{d}"}
    reduced = re.findall(r"= (\S.*?) all-reduce\(", text)
    shapes = {shape for result in reduced for shape in re.findall(r"\w+\[([\d,]*)\]", result)}
    rows = b // (axes[0] * axes[1]) * m  # a device's own
    sizes = {np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes}
    # Of the table's gradient only shards of pieces, over data: the sum within fsdp is a reduce-scatter.
    pieces = {20 * d // axes[1], v // axes[2] % 20 * d // axes[1]} if axes[0] > 1 else set()
    assert sizes <= {rows, rows * d} | pieces
    assert " reduce-scatter(" in text


# ---- rows in the loss --------------------------------------------------------------------------------------


def test_rows_are_compacted_and_filled_up_to_the_bucket() -> None:
    mask = np.zeros((2, 2, 8), bool)
    mask[0, 0, 3], mask[0, 1, :2], mask[1, 1, 7] = True, True, True
    assert loss_rows(mask).tolist() == [[3, 8, 9, *[16] * 5], [15, *[16] * 7]]  # a half of 16 rows


def test_loss_rows_have_few_widths_whatever_the_episodes() -> None:
    """Each is another program of the update; on the way from 1 to 48 tokens there were eight."""
    masks = [np.arange(48).reshape(1, 4, 12) < count for count in range(49)]
    assert sorted({loss_rows(mask).shape[1] for mask in masks}) == [24, 36, 48]
    assert loss_rows(masks[5], most=30).shape[1] == 36


def test_rows_that_only_pad_change_neither_loss_nor_gradients() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 3, 16, 12), np.float32)
    table, last = rng.standard_normal((70, 12), np.float32), rng.standard_normal((2, 12), np.float32)
    tokens, mask = rng.integers(0, 70, (2, 3, 16)), rng.random((2, 3, 16)) < 0.3
    weights = rng.standard_normal(mask.shape, np.float32)

    def loss(hidden: jax.Array, table: jax.Array, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        states, targets = states_before(last, hidden, rows), take_rows(jnp.asarray(tokens), rows)
        logprobs, entropy = (put_rows(x, rows, 3, 16) for x in token_logprobs(states, table, targets, 0.7, 20))
        return jnp.sum(weights * logprobs) + 0.1 * jnp.sum(entropy), logprobs

    few, many = loss_rows(mask), loss_rows(mask, most=mask[0].size)
    assert few.shape == (2, 24) and many.shape == (2, 48)
    (narrow, wide) = (jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, table, rows) for rows in (few, many))
    # Rounding only: vectors of another length have another rest, and the table's gradient is a sum over all rows.
    for few_rows, many_rows in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(few_rows, many_rows, rtol=2e-6, atol=2e-6)


@given(
    st.tuples(*[st.integers(1, 4)] * 2, st.integers(1, 20)).flatmap(lambda shape: np_arrays(bool, shape)),
)
@settings(max_examples=60, deadline=None)
def test_any_mask_is_taken_apart_and_put_together_again(mask: np.ndarray) -> None:
    b, g, r = mask.shape
    rows = loss_rows(mask)
    most, widths = mask.reshape(b, -1).sum(axis=1).max(), [math.ceil(g * r * part / 4) for part in ROW_QUARTERS]
    assert rows.shape[1] == min(width for width in widths if width >= most)
    values = np.arange(1.0, mask.size + 1, dtype=np.float32).reshape(mask.shape)
    np.testing.assert_array_equal(put_rows(take_rows(values, rows), rows, g, r), np.where(mask, values, 0))
    # The state before a token is its member's last one, or the prefix's.
    hidden, last = np.stack([values, -values], axis=-1), np.arange(2.0 * b, dtype=np.float32).reshape(b, 2) - 999
    before = np.concatenate([np.broadcast_to(last[:, None, None], (b, g, 1, 2)), hidden[:, :, :-1]], axis=2)
    states = np.asarray(states_before(jnp.asarray(last), jnp.asarray(hidden), rows))
    for group in range(b):
        np.testing.assert_array_equal(states[group, : mask[group].sum()], before[group][mask[group]])
    assert np.isfinite(states).all()
