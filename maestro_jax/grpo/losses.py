"""Policy losses as pure functions: `loss(inputs, config) → (scalar, metrics)`.

Every member token has a surrogate (`LossConfig.surrogate`), and an aggregation makes one number of them. The published
losses are pairs of the two (the settings of each: docs/method.md, Learning):

* GRPO (Shao et al. 2024, arXiv 2402.03300): "ppo", "sequence".
* DAPO (Yu et al. 2025, arXiv 2503.14476): "ppo" with an asymmetric clip, "token".
* Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): "ppo", "constant".
* GSPO (Zheng et al. 2025, arXiv 2507.18071): "gspo", "sequence".
* CISPO (MiniMax-M1, 2025, arXiv 2506.13585): "cispo", "token".
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

# How these statistics of a batch come from those of its microbatches; all others are means over the tokens in the loss.
PEAKS = {"ratio_max": jnp.maximum, "ratio_min": jnp.minimum, "logprob_gap": jnp.maximum}

# `logprob_gap_above_...` is the share of tokens beyond each of these, in nats. How to read them: docs/method.md.
GAPS = (0.02, 0.1, 1.0)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is clipped and how token losses become one number.

    `clip_low`, `clip_high`: ratios are clipped to [1 - clip_low, 1 + clip_high]; from 1 on, clip_low is no bound.
    `aggregation`: "sequence" averages tokens within a member, then members (GRPO); "token" averages
    all tokens (DAPO); "constant" divides each member's sum by `constant_length` (Dr.GRPO).
    `entropy_weight` times the entropy of the token distributions, reduced likewise, is rewarded (0: off).
    `kl_weight` times the divergence from the reference policy, estimated on the sampled tokens, is
    punished (0: off). Both also reach groups whose members all failed, where no advantage teaches.
    `kl_estimator`: "k1", "k2" or "k3" of Schulman's "Approximating KL Divergence" (2020).
    `surrogate`: "ppo" clips the update of a token whose ratio has left the range (Schulman et al. 2017); "gspo" does so
    for a member as a whole, by the geometric mean of its ratios; "cispo" clips the ratio only as the weight of the
    token's log-probability, so every token keeps a gradient.
    `importance_cap`: truncated importance sampling (`importance_weights`), the weights' upper bound (0: off).
    """

    clip_low: float
    clip_high: float
    aggregation: str
    constant_length: int
    entropy_weight: float = 0.0
    kl_weight: float = 0.0
    kl_estimator: str = "k3"
    surrogate: str = "ppo"
    importance_cap: float = 0.0


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
    proximal_logprobs: Array | None = None  # float32 [B, G, R]: see `proximal`; None: its default


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossCount:
    """What losses are divided by; the counts of the microbatches of a batch add up to its own."""

    tokens: Array | int  # int32 []: in the loss
    members: Array | int  # int32 []: with a token in the loss

    def __add__(self, other: "LossCount") -> "LossCount":
        return LossCount(self.tokens + other.tokens, self.members + other.members)


def count_loss(mask: Array) -> LossCount:
    """Counts a mask `[..., G, R]`, on the device or (in numpy) on the host."""
    return LossCount(mask.sum(), mask.any(axis=-1).sum())


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over True entries, 0 if there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def policy_loss(
    inputs: LossInputs, config: LossConfig, denominator: Array | float | None = None
) -> tuple[Array, dict[str, Array]]:
    """The policy-gradient loss (to be minimised) and its statistics.

    Args:
      inputs: a batch, or with `denominator` a microbatch of one.
      denominator: `loss_denominator` of the whole batch, or 1 to divide later; the losses of its microbatches
        then sum to the batch's, however it is cut, and so do their gradients. The statistics are the microbatch's.
    """
    anchor = proximal(inputs, config)
    log_ratio = jnp.where(inputs.mask, inputs.logprobs - anchor, 0.0)
    token_loss, metrics = surrogate_loss(log_ratio, inputs, config)
    gap = jnp.abs(jnp.where(inputs.mask, inputs.logprobs - inputs.old_logprobs, 0.0))
    metrics["logprob_gap"] = jnp.max(gap)
    for bound in GAPS:
        metrics[f"logprob_gap_above_{bound:g}"] = masked_mean((gap > bound).astype(jnp.float32), inputs.mask)
    if config.importance_cap:
        weights, statistics = importance_weights(anchor, inputs.old_logprobs, inputs.mask, config.importance_cap)
        token_loss, metrics = weights * token_loss, metrics | statistics
    if config.entropy_weight:
        token_loss = token_loss - config.entropy_weight * inputs.entropy
    if config.kl_weight:
        kl = token_kl(jnp.where(inputs.mask, inputs.logprobs - inputs.reference_logprobs, 0.0), config.kl_estimator)
        token_loss = token_loss + config.kl_weight * kl
        metrics["kl"] = masked_mean(kl, inputs.mask)
    return aggregate(token_loss, inputs.mask, config, denominator), metrics


def proximal(inputs: LossInputs, config: LossConfig) -> Array:
    """Log-probabilities `[B, G, R]` that ratios are against: those of the policy which the clip keeps an update near.

    Without importance weights that is the sampler: the ratio itself corrects for it. With them the weight does, and
    a ratio against the sampler would count the correction twice. The proximal policy is then the one at the start
    of the updates on this batch; if there is one update, that is the policy being trained, at ratio one.
    """
    if inputs.proximal_logprobs is not None:
        return inputs.proximal_logprobs
    return jax.lax.stop_gradient(inputs.logprobs) if config.importance_cap else inputs.old_logprobs


def surrogate_loss(log_ratio: Array, inputs: LossInputs, config: LossConfig) -> tuple[Array, dict[str, Array]]:
    """Token losses `[B, G, R]` of `config.surrogate` from the tokens' log-ratios (0 outside the mask); statistics."""
    if config.surrogate == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, inputs.mask)
    ratio = jnp.exp(log_ratio)
    advantages = inputs.advantages[..., None]
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.surrogate == "cispo":
        token_loss = -jax.lax.stop_gradient(clipped) * advantages * inputs.logprobs
        outside = ratio != clipped
    else:
        token_loss = -jnp.minimum(ratio * advantages, clipped * advantages)
        outside = ratio * advantages > clipped * advantages
    return token_loss, {
        "clip_fraction": masked_mean(outside.astype(jnp.float32), inputs.mask),
        "ratio_mean": masked_mean(ratio, inputs.mask),
        "ratio_max": jnp.max(ratio, where=inputs.mask, initial=0.0),
        "ratio_min": jnp.min(ratio, where=inputs.mask, initial=jnp.inf),
    }


def sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """Each member's mean log-ratio at every token `[B, G, R]`, with the gradient of the token's own (GSPO-token).

    Summed over a member this is the gradient of the sequence form, s = exp(mean log-ratio); tokens keep their own
    part of it, so that token weights reach the tokens they belong to (Zheng et al. 2025, section 4.3).
    """
    tokens = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    mean = jnp.sum(log_ratio, axis=-1, keepdims=True) / tokens
    return jax.lax.stop_gradient(mean) + (log_ratio - jax.lax.stop_gradient(log_ratio))


def importance_weights(proximal: Array, sampled: Array, mask: Array, cap: float) -> tuple[Array, dict[str, Array]]:
    """Truncated importance sampling: constant weights min(proximal / sampled, cap) of tokens `[B, G, R]`; statistics.

    Corrects the policy loss for tokens drawn from another policy than the update starts from: other kernels, or older
    parameters (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    With one update per batch no ratio leaves the clip range; every surrogate then has the gradient that "cispo" has
    without weights, at clip_low >= 1 and clip_high = cap - 1.
    The divergence and the entropy are not weighted.
    """
    weights = jax.lax.stop_gradient(jnp.exp(jnp.where(mask, proximal - sampled, 0.0)))
    kept = jnp.minimum(weights, cap)
    capped = masked_mean((weights > cap).astype(jnp.float32), mask)
    return kept, {"importance_weight": masked_mean(kept, mask), "importance_capped": capped}


def token_kl(log_ratio: Array, estimator: str) -> Array:
    """Estimates KL(policy ‖ reference) per token from `log_ratio`, policy over reference, of sampled tokens."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return jnp.exp(-log_ratio) - 1.0 + log_ratio


def loss_denominator(count: LossCount, config: LossConfig) -> Array:
    """What the loss of a batch is divided by: tokens, members or members times length."""
    if config.aggregation == "token":
        return jnp.maximum(count.tokens, 1)
    members = jnp.maximum(count.members, 1)
    return members * config.constant_length if config.aggregation == "constant" else members


def aggregate(token_loss: Array, mask: Array, config: LossConfig, denominator: Array | float | None = None) -> Array:
    """Reduces token losses `[B, G, R]` to a scalar (see `LossConfig.aggregation`).

    A mean over the microbatches of a batch would weigh a member by the one it fell into; hence their
    `denominator` is the whole batch's (`loss_denominator`), and they are summed.
    """
    if denominator is None:
        denominator = loss_denominator(count_loss(mask), config)
    kept = jnp.where(mask, token_loss, 0.0)
    if config.aggregation == "sequence":
        kept = jnp.sum(kept, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
    return jnp.sum(kept) / denominator
