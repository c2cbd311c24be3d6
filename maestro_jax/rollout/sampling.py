"""The next token of every lane and its exact log-probability."""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """The distribution that tokens are drawn from.

    Attributes:
      temperature: divides the logits.
      top_k: only so many of the likeliest tokens may be drawn; 0 allows all.
      top_p: only the likeliest tokens that together reach this probability; 1 allows all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sample(
    logits: Array, keys: Array, turn: Array, position: Array, noise: Array, config: SamplingConfig
) -> tuple[Array, Array]:
    """Draws a token a lane, by the Gumbel-max trick.

    The randomness of a lane depends on its own key, turn and position only, so no result depends
    on which lanes run beside it or in which order experts answer.

    Args:
      logits: fp32 `[..., V]`.
      keys: uint32 `[..., 2]`, threefry key data.
      turn, position: int32 `[...]`; the position is that in the turn.
      noise: float32 `[]`, above 0 to sample, 0 for the likeliest token (one program serves both).

    Returns:
      Tokens int32 `[...]`, and their log-probabilities fp32 under the distribution that was drawn from.
    """
    logits = _truncate(logits / config.temperature, config)

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


def _truncate(logits: Array, config: SamplingConfig) -> Array:
    """Logits in which tokens that may not be drawn are minus infinity; ties with the last allowed one may be."""
    if not config.top_k and config.top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    lowest = jnp.full((*logits.shape[:-1], 1), -jnp.inf)
    if config.top_k:
        lowest = ordered[..., min(config.top_k, logits.shape[-1]) - 1, None]
    if config.top_p < 1.0:
        among = jnp.where(ordered >= lowest, ordered, -jnp.inf)  # top-p of what top-k leaves
        shares = jax.nn.softmax(among, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        reached = jnp.where(before < config.top_p, among, jnp.inf)
        lowest = jnp.maximum(lowest, jnp.min(reached, axis=-1, keepdims=True))
    return jnp.where(logits >= lowest, logits, -jnp.inf)
