"""Parts of a softmax are merged into one softmax, forwards and backwards, whoever computes the parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_jax.policy.attention import merge
from maestro_jax.policy.attention.blocks import Blocks
from maestro_jax.policy.attention.merge import Pair, Part, masked, softmaxed
from tests.policy.attention import plain
from tests.policy.reference import assert_near

B, N, K, H = 2, 4, 2, 8
TOLERANCE = 2e-6  # fp32, of the largest value: sums of some 20 terms in another order


@dataclasses.dataclass(frozen=True)
class Dense:
    """The least that a new chip's file has to hold."""

    def _scores(self, q: jax.Array, k: jax.Array, seen: jax.Array, causal: bool) -> jax.Array:
        t, s = q.shape[2], k.shape[2]
        mask = seen[:, None, None] & (jnp.tril(jnp.ones((t, s), bool), s - t) if causal else True)
        return masked(jnp.einsum("bnth,bnsh->bnts", q, _repeated(k, q)), mask)

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, causal: bool) -> Pair:
        return softmaxed(self._scores(q, k, seen, causal), _repeated(v, q))

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        seen: jax.Array,
        causal: bool,
        out: jax.Array,
        lse: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        weights = jnp.exp(self._scores(q, k, seen, causal) - lse[..., None])
        of_weights = jnp.einsum("bnth,bnsh->bnts", gradient, _repeated(v, q))
        ds = weights * (of_weights - jnp.sum(out * gradient, axis=-1, keepdims=True))
        dk, dv = (jnp.einsum("bnts,bnth->bnsh", *pair) for pair in ((ds, q), (weights, gradient)))
        one = [x.reshape(*k.shape[:2], -1, *k.shape[2:]).sum(axis=2) for x in (dk, dv)]
        return jnp.einsum("bnts,bnsh->bnth", ds, _repeated(k, q)), *one


def _repeated(x: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.repeat(x, q.shape[1] // x.shape[1], axis=1)


# Keys in front, a causal sequence behind them, then three short sequences that see all of it and themselves.
PARTS = (
    Part((0, 5), (0, 9), causal=True),
    Part((5, 11), (0, 9)),
    Part((5, 11), (9, 15), causal=True, sequences=3),
)
MASK = np.zeros((11, 15), bool)
MASK[:5, :9] = np.tril(np.ones((5, 9), bool), 4)
MASK[5:, :9] = True
MASK[5:, 9:] = np.kron(np.eye(3, dtype=bool), np.tril(np.ones((2, 2), bool)))
KERNELS = {"dense": Dense(), "blocks of 2": Blocks(2), "one block": Blocks(64)}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("size", [1.0, 4.0], ids=["", "sharp"])
def test_value_and_gradient_of_one_softmax(kernel: merge.Kernel, size: float) -> None:
    q, k, v, weights = (
        size * normal(0, B, N, 11, H),
        normal(1, B, K, 15, H),
        normal(2, B, K, 15, H),
        normal(3, B, N, 11, H),
    )
    seen = jnp.asarray(np.random.default_rng(4).random((B, 15)) < 0.6).at[:, 0].set(True)

    def in_parts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(weights * merge.attend(q, k, v, seen, PARTS, kernel))

    def at_once(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = plain.attend(*(x.swapaxes(1, 2) for x in (q, k, v)), seen[:, None] & MASK)
        return jnp.sum(weights * out.swapaxes(1, 2))

    found, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (in_parts, at_once))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for name, mine, theirs in zip("qkv", found[1], wanted[1], strict=True):
        assert float(jnp.abs(theirs).max()) > 1e-2, f"{name} takes no part"
        assert_near(mine, theirs, TOLERANCE * size, name)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=4), st.integers(0, 99))
def test_any_cut_of_the_keys_gives_the_same_pair(cuts: list[int], seed: int) -> None:
    scores, values = 3 * normal(seed, 5, 12), normal(seed + 1, 12, H)
    mask = np.random.default_rng(seed).random((5, 12)) < 0.5  # a part may have nothing to be seen, for some or for all
    mask[:, 0] = True
    scores = masked(scores, mask)
    ends = sorted({0, 12, *cuts})
    pairs = [softmaxed(scores[:, a:b], values[a:b]) for a, b in zip(ends, ends[1:])]  # noqa: B905
    for mine, theirs in zip(merge.merge(pairs), softmaxed(scores, values), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_large_logits_and_queries_that_see_nothing_stay_finite(kernel: merge.Kernel) -> None:
    q, k, v = normal(0, B, N, 11, H), normal(1, B, K, 15, H), normal(2, B, K, 15, H)
    assert bool(jnp.isfinite(merge.attend(1e3 * q, k, v, jnp.ones((B, 15), bool), PARTS, kernel)).all())
    seen = jnp.zeros((B, 15), bool)
    out, pull = jax.vjp(lambda *x: merge.attend(*x, seen, PARTS, kernel), q, k, v)
    assert bool(jnp.isfinite(out).all())
    for gradient in pull(jnp.zeros_like(out)):
        assert float(jnp.abs(gradient).max()) == 0
