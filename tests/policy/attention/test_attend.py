"""Segmented attention is one softmax over all keys, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.policy.attention.interface import Segment, attend

B, G, T, N, K, H, ROOT, P = 2, 3, 4, 4, 2, 8, 5, 6
SCALE = H**-0.5


def arrays() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {
        "q": (B, G, T, N, H),
        "root_k": (ROOT, K, H),
        "root_v": (ROOT, K, H),
        "prefix_k": (B, P, K, H),
        "prefix_v": (B, P, K, H),
        "own_k": (B, G, T, K, H),
        "own_v": (B, G, T, K, H),
    }
    return {name: jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def masks(prefix_lengths: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    prefix = jnp.arange(P) < jnp.array(prefix_lengths)[:, None]
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, G, T, T))
    return jnp.ones(ROOT, bool), prefix, causal


def segmented(x: dict[str, jax.Array], prefix_lengths: tuple[int, int]) -> jax.Array:
    root, prefix, own = masks(prefix_lengths)
    segments = [
        Segment(x["root_k"], x["root_v"], root),
        Segment(x["prefix_k"], x["prefix_v"], prefix),
        Segment(x["own_k"], x["own_v"], own),
    ]
    return attend(x["q"], segments, SCALE)


def repeated(x: dict[str, jax.Array], prefix_lengths: tuple[int, int]) -> jax.Array:
    """Root and prefix copied to every member, KV heads to every query head, one plain softmax."""

    def keys(kind: str) -> jax.Array:
        root = jnp.broadcast_to(x[f"root_{kind}"], (B, G, ROOT, K, H))
        prefix = jnp.broadcast_to(x[f"prefix_{kind}"][:, None], (B, G, P, K, H))
        return jnp.repeat(jnp.concatenate([root, prefix, x[f"own_{kind}"]], axis=2), N // K, axis=3)

    root, prefix, own = masks(prefix_lengths)
    shape = (B, G, T)
    seen = jnp.concatenate(
        [jnp.broadcast_to(root, (*shape, ROOT)), jnp.broadcast_to(prefix[:, None, None], (*shape, P)), own], axis=-1
    )
    logits = jnp.einsum("bgtnh,bgpnh->bgntp", x["q"], keys("k")) * SCALE
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bgntp,bgpnh->bgtnh", weights, keys("v"))


@pytest.mark.parametrize("prefix_lengths", [(6, 3), (2, 0)], ids=["ragged", "one segment wholly masked"])
def test_value_and_gradient_of_one_softmax(prefix_lengths: tuple[int, int]) -> None:
    x = arrays()
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((B, G, T, N, H)), jnp.float32)
    found = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * segmented(x, prefix_lengths))))(x)
    wanted = jax.jit(jax.value_and_grad(lambda x: jnp.sum(weights * repeated(x, prefix_lengths))))(x)
    # fp32 sums over 15 keys in another order: 1e-6; a wrong normaliser is off by parts of one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_large_logits_stay_finite() -> None:
    x = {name: 100 * value for name, value in arrays().items()}
    assert jnp.isfinite(segmented(x, (6, 3))).all()
