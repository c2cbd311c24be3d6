"""Policy losses as pure functions: `loss(inputs, config) → (scalar, metrics)`.

One clipped-ratio loss covers GRPO (Shao et al. 2024), DAPO (asymmetric clip and token mean, Yu et
al. 2025) and Dr.GRPO (constant normaliser, Liu et al. 2025): they differ in `clip_low`, `clip_high`
and `aggregation` only.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

AGGREGATIONS = ("sequence", "token", "constant")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Clip range of the ratio and how token losses become one number.

    `aggregation`: "sequence" averages tokens within a member, then members (GRPO); "token" averages
    all tokens (DAPO); "constant" divides each member's sum by `constant_length` (Dr.GRPO).
    """

    clip_low: float
    clip_high: float
    aggregation: str
    constant_length: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Arrays of one batch of groups."""

    logprobs: Array  # float32 [B, G, R]: under the parameters being trained
    old_logprobs: Array  # float32 [B, G, R]: as sampled
    advantages: Array  # float32 [B, G]
    mask: Array  # bool [B, G, R]: policy-authored tokens of valid members


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over True entries, 0 if there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def policy_loss(inputs: LossInputs, config: LossConfig) -> tuple[Array, dict[str, Array]]:
    """Clipped policy-gradient loss (to be minimised) and its statistics."""
    log_ratio = jnp.where(inputs.mask, inputs.logprobs - inputs.old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    advantages = inputs.advantages[..., None]
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    token_loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    metrics = {
        "clip_fraction": masked_mean((ratio * advantages > clipped * advantages).astype(jnp.float32), inputs.mask),
        "ratio_max": jnp.max(jnp.where(inputs.mask, ratio, 1.0)),
        "logprob_gap": jnp.max(jnp.abs(log_ratio)),
    }
    return aggregate(token_loss, inputs.mask, config), metrics


def aggregate(token_loss: Array, mask: Array, config: LossConfig) -> Array:
    """Reduces token losses `[B, G, R]` to a scalar (see `LossConfig.aggregation`)."""
    kept = jnp.where(mask, token_loss, 0.0)
    if config.aggregation == "token":
        return jnp.sum(kept) / jnp.maximum(jnp.sum(mask), 1)
    members = jnp.maximum(jnp.sum(jnp.any(mask, axis=-1)), 1)
    if config.aggregation == "constant":
        return jnp.sum(kept) / (members * config.constant_length)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(jnp.sum(kept, axis=-1) / tokens) / members
