"""Log-probabilities of tokens from hidden states, without ever holding `[tokens, vocabulary]`.

Chunks over time with the batch left sharded; each chunk's logits are recomputed in the backward
pass. At a vocabulary of 151,936 this is the difference between gigabytes and megabytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def token_logprobs(
    logits: Callable[[Array], Array], hidden: Array, targets: Array, temperature: float, chunk: int
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy of its distribution.

    Args:
      logits: maps hidden states `[..., D]` to fp32 logits `[..., V]`.
      hidden: `[B, G, R, D]`, the states from which the targets are predicted.
      targets: int32 `[B, G, R]`.
      temperature: the sampler's; both sides must divide by the same one.
      chunk: tokens of R at a time; must divide R.

    Returns:
      fp32 `[B, G, R]` log-probabilities and entropies (nats).
    """
    b, g, r, d = hidden.shape
    if r % chunk:
        raise ValueError(f"chunk {chunk} must divide the {r} member tokens")

    @jax.checkpoint
    def one(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        h, target = inputs
        logprobs = jax.nn.log_softmax(logits(h) / temperature, axis=-1)
        chosen = jnp.take_along_axis(logprobs, target[..., None], axis=-1)[..., 0]
        return None, (chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1))

    over_time = hidden.reshape(b, g, r // chunk, chunk, d).transpose(2, 0, 1, 3, 4)
    targets_over_time = targets.reshape(b, g, r // chunk, chunk).transpose(2, 0, 1, 3)
    _, (logprobs, entropy) = jax.lax.scan(one, None, (over_time, targets_over_time))
    return tuple(x.transpose(1, 2, 0, 3).reshape(b, g, r) for x in (logprobs, entropy))
