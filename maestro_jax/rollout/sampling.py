"""The next token of every lane and its exact log-probability."""

import jax
import jax.numpy as jnp

Array = jax.Array


def sample(
    logits: Array, keys: Array, turn: Array, position: Array, noise: Array, temperature: float
) -> tuple[Array, Array]:
    """Draws a token a lane, by the Gumbel-max trick.

    The randomness of a lane depends on its own key, turn and position only, so no result depends
    on which lanes run beside it or in which order experts answer.

    Args:
      logits: fp32 `[..., V]`.
      keys: uint32 `[..., 2]`, threefry key data.
      turn, position: int32 `[...]`; the position is that in the turn.
      noise: float32 `[]`, above 0 to sample, 0 for the likeliest token (one program serves both).
      temperature: divides the logits.

    Returns:
      Tokens int32 `[...]`, and their log-probabilities fp32 under the distribution that was drawn from.
    """
    logits = logits / temperature

    def gumbel(key_data: Array, turn: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, turn), position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    drawn = gumbel
    for _ in range(turn.ndim):
        drawn = jax.vmap(drawn)
    # A branch, and not a product with 0: greedy decoding draws nothing, and XLA for CPUs would fuse the random numbers
    # into the argmax, on one thread.
    perturbation = jax.lax.cond(noise > 0, drawn, lambda *_: jnp.zeros_like(logits), keys, turn, position)
    token = jnp.argmax(logits + perturbation, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)
