"""Chunked log-probabilities against one log-softmax over everything, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.grpo.logprobs import token_logprobs

B, G, R, D, V = 2, 2, 6, 8, 50
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def arrays() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((B, G, R, D)), 2 * rng.standard_normal((V, D))
    weights = rng.standard_normal((2, B, G, R))
    targets = rng.integers(0, V, (B, G, R))
    return tuple(jnp.asarray(x, jnp.float32) for x in (hidden, table, weights)) + (jnp.asarray(targets),)


def at_once(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    logprobs = jax.nn.log_softmax(hidden @ table.T / TEMPERATURE, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def in_chunks(hidden: jax.Array, table: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    return token_logprobs(lambda h: h @ table.T, hidden, targets, TEMPERATURE, chunk)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_log_softmax_and_entropy_with_their_gradients(arrays: tuple[jax.Array, ...], chunk: int) -> None:
    hidden, table, weights, targets = arrays

    def total(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(weights[0] * pair[0]) + jnp.sum(weights[1] * pair[1])

    # fp32 sums over 50 logits: 1e-6; the size of the values is about 10.
    near = {"rtol": 1e-5, "atol": 1e-5}
    found, wanted = in_chunks(hidden, table, targets, chunk), at_once(hidden, table, targets)
    np.testing.assert_allclose(found, wanted, **near)
    slope = jax.grad(lambda h, t: total(in_chunks(h, t, targets, chunk)), argnums=(0, 1))(hidden, table)
    right = jax.grad(lambda h, t: total(at_once(h, t, targets)), argnums=(0, 1))(hidden, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near), slope, right)


def test_a_chunk_must_divide_the_tokens(arrays: tuple[jax.Array, ...]) -> None:
    hidden, table, _, targets = arrays
    with pytest.raises(ValueError, match="chunk 4 must divide the 6 member tokens"):
        in_chunks(hidden, table, targets, 4)
