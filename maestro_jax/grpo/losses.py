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
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Clip range of the ratio and how token losses become one number.

    `aggregation`: "sequence" averages tokens within a member, then members (GRPO); "token" averages
    all tokens (DAPO); "constant" divides each member's sum by `constant_length` (Dr.GRPO).
    `entropy_weight` times the entropy of the token distributions, reduced likewise, is rewarded (0: off).
    `kl_weight` times the divergence from the reference policy, estimated on the sampled tokens, is
    punished (0: off). Both also reach groups whose members all failed, where no advantage teaches.
    `kl_estimator`: "k1", "k2" or "k3" of Schulman's "Approximating KL Divergence" (2020).
    """

    clip_low: float
    clip_high: float
    aggregation: str
    constant_length: int
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    kl_estimator: str = "k3"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Arrays of one batch of groups."""

    logprobs: Array  # float32 [B, G, R]: under the parameters being trained
    entropy: Array  # float32 [B, G, R]: of the distributions the tokens were drawn from, nats
    old_logprobs: Array  # float32 [B, G, R]: as sampled
    reference_logprobs: Array  # float32 [B, G, R]: under the reference policy; read if kl_weight is not 0
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
    if config.entropy_weight:
        token_loss = token_loss - config.entropy_weight * inputs.entropy
    if config.kl_weight:
        kl = token_kl(jnp.where(inputs.mask, inputs.logprobs - inputs.reference_logprobs, 0.0), config.kl_estimator)
        token_loss = token_loss + config.kl_weight * kl
        metrics["kl"] = masked_mean(kl, inputs.mask)
    return aggregate(token_loss, inputs.mask, config), metrics


def token_kl(log_ratio: Array, estimator: str) -> Array:
    """Estimates KL(policy ‖ reference) per token from `log_ratio`, policy over reference, of sampled tokens."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return jnp.exp(-log_ratio) - 1.0 + log_ratio


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
