"""The policy loss against plain loops, one for each published variant."""

import dataclasses
import math
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.grpo.config import Surrogate
from maestro_jax.grpo.losses import (
    LossConfig,
    LossInputs,
    importance_weights,
    masked_mean,
    policy_loss,
)

B, G, R = 2, 3, 5
GRPO = LossConfig(clip_low=0.2, clip_high=0.2, aggregation="sequence", constant_length=R)
DAPO = LossConfig(clip_low=0.2, clip_high=0.28, aggregation="token", constant_length=R)
DR_GRPO = LossConfig(clip_low=0.2, clip_high=0.2, aggregation="constant", constant_length=32)


@pytest.fixture(scope="module")
def inputs() -> LossInputs:
    rng = np.random.default_rng(0)
    old = rng.uniform(-3, 0, (B, G, R)).astype(np.float32)
    new = old + rng.normal(0, 0.3, (B, G, R)).astype(np.float32)  # about half of the ratios leave the clip range
    mask = rng.random((B, G, R)) < 0.7
    mask[0, 1] = False  # a member that is not in the loss
    advantages = rng.standard_normal((B, G)).astype(np.float32)
    entropy = rng.uniform(0, 2, (B, G, R)).astype(np.float32)
    reference = new + rng.normal(0, 0.5, (B, G, R)).astype(np.float32)
    return LossInputs(*map(jnp.asarray, (new, entropy, old, reference, advantages, mask)))


def member_losses(inputs: LossInputs, low: float, high: float) -> list[list[float]]:
    """Clipped token losses of every member that has tokens in the loss."""
    found = []
    for b, g in np.ndindex(B, G):
        advantage = float(inputs.advantages[b, g])
        losses = []
        for r in range(R):
            if inputs.mask[b, g, r]:
                ratio = math.exp(float(inputs.logprobs[b, g, r]) - float(inputs.old_logprobs[b, g, r]))
                clipped = min(max(ratio, 1 - low), 1 + high)
                losses.append(-min(ratio * advantage, clipped * advantage))
        if losses:
            found.append(losses)
    return found


def test_grpo_averages_tokens_and_then_members(inputs: LossInputs) -> None:
    members = member_losses(inputs, 0.2, 0.2)
    wanted = sum(sum(m) / len(m) for m in members) / len(members)
    np.testing.assert_allclose(policy_loss(inputs, GRPO)[0], wanted, rtol=1e-5)


def test_dapo_averages_all_tokens_under_an_asymmetric_clip(inputs: LossInputs) -> None:
    members = member_losses(inputs, 0.2, 0.28)
    wanted = sum(map(sum, members)) / sum(map(len, members))
    np.testing.assert_allclose(policy_loss(inputs, DAPO)[0], wanted, rtol=1e-5)


def test_dr_grpo_divides_by_a_constant(inputs: LossInputs) -> None:
    members = member_losses(inputs, 0.2, 0.2)
    wanted = sum(sum(m) / 32 for m in members) / len(members)
    np.testing.assert_allclose(policy_loss(inputs, DR_GRPO)[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("config", [GRPO, DAPO, DR_GRPO], ids=["grpo", "dapo", "dr_grpo"])
def test_tokens_outside_the_mask_have_no_say(inputs: LossInputs, config: LossConfig) -> None:
    spoiled = dataclasses.replace(
        inputs,
        logprobs=jnp.where(inputs.mask, inputs.logprobs, 300.0),  # exp(300) overflows fp32
        old_logprobs=jnp.where(inputs.mask, inputs.old_logprobs, -jnp.inf),
    )

    def loss(logprobs: jax.Array, given: LossInputs) -> jax.Array:
        return policy_loss(dataclasses.replace(given, logprobs=logprobs), config)[0]

    value, gradient = jax.value_and_grad(loss)(spoiled.logprobs, spoiled)
    assert value == loss(inputs.logprobs, inputs)
    assert jnp.isfinite(gradient).all() and not gradient[~inputs.mask].any()


def test_on_policy_the_gradient_is_the_advantage(inputs: LossInputs) -> None:
    """At ratio one: d loss / d logprob = -advantage / (tokens of the member x members)."""
    on_policy = dataclasses.replace(inputs, old_logprobs=inputs.logprobs)

    def loss(logprobs: jax.Array) -> jax.Array:
        return policy_loss(dataclasses.replace(on_policy, logprobs=logprobs), GRPO)[0]

    tokens = np.maximum(np.asarray(inputs.mask).sum(axis=-1), 1)
    members = np.asarray(inputs.mask).any(axis=-1).sum()
    wanted = np.where(inputs.mask, -(np.asarray(inputs.advantages) / tokens / members)[..., None], 0.0)
    np.testing.assert_allclose(jax.grad(loss)(inputs.logprobs), wanted, rtol=1e-5, atol=1e-7)


def test_clipping_stops_the_gradient_only_where_it_would_go_further() -> None:
    ratio = jnp.log(jnp.array([[[1.5, 1.5, 0.5, 0.5]]])).reshape(1, 4, 1)
    zeros, mask = jnp.zeros((1, 4, 1)), jnp.ones((1, 4, 1), bool)
    inputs = LossInputs(ratio, zeros, zeros, zeros, jnp.array([[1.0, -1.0, 1.0, -1.0]]), mask)
    gradient = jax.grad(lambda x: policy_loss(dataclasses.replace(inputs, logprobs=x), GRPO)[0])(ratio)
    assert (gradient[0, :, 0] != 0).tolist() == [False, True, True, False]
    assert policy_loss(inputs, GRPO)[1]["clip_fraction"] == 0.5


def one_member(log_ratios: list[float], advantage: float, surrogate: str, **other: float) -> tuple[float, list, dict]:
    """Loss, gradient per token and statistics of one member, old log-probabilities 0, clipped to [0.8, 1.5]."""
    config = LossConfig(0.2, 0.5, "sequence", R, surrogate=surrogate, **other)  # type: ignore[arg-type]
    zeros = jnp.zeros((1, 1, len(log_ratios)))
    inputs = LossInputs(zeros, zeros, zeros, zeros, jnp.full((1, 1), advantage), zeros == 0)

    def loss(logprobs: jax.Array) -> tuple[jax.Array, dict]:
        return policy_loss(dataclasses.replace(inputs, logprobs=logprobs), config)

    at = jnp.asarray(log_ratios).reshape(1, 1, -1)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(at)
    return float(value), gradient.ravel().tolist(), {name: float(x) for name, x in metrics.items()}


TWICE, HALF, FOUR = math.log(2), math.log(0.5), math.log(4)


def test_gspo_clips_a_member_as_a_whole() -> None:
    """Ratios 2 and 1/2: s = 1, nothing is clipped. Ratios 4 and 1: s = 2, clipped if that is good, kept if bad."""
    value, gradient, metrics = one_member([TWICE, HALF], 1.0, "gspo")
    np.testing.assert_allclose([value, *gradient], [-1.0, -0.5, -0.5], rtol=1e-6)
    assert metrics["clip_fraction"] == 0.0 and metrics["ratio_max"] == 1.0
    np.testing.assert_allclose(metrics["logprob_gap"], TWICE, rtol=1e-6)  # stays that of tokens

    value, gradient, metrics = one_member([FOUR, 0.0], 1.0, "gspo")
    np.testing.assert_allclose([value, *gradient], [-1.5, 0.0, 0.0], rtol=1e-6)
    assert metrics["clip_fraction"] == 1.0
    value, gradient, metrics = one_member([FOUR, 0.0], -1.0, "gspo")
    np.testing.assert_allclose([value, *gradient], [2.0, 1.0, 1.0], rtol=1e-6)
    assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_cispo_clips_weights_and_keeps_every_gradient(advantage: float) -> None:
    """Ratios 4, 1 and 1/2 weigh 1.5, 1 and 0.8, whatever the sign; loss = -weight x advantage x log-probability."""
    value, gradient, metrics = one_member([FOUR, 0.0, HALF], advantage, "cispo")
    np.testing.assert_allclose(gradient, [-advantage * w / 3 for w in (1.5, 1.0, 0.8)], rtol=1e-6)
    np.testing.assert_allclose(value, -advantage * (1.5 * FOUR + 0.8 * HALF) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_fraction"], 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("surrogate", get_args(Surrogate))
def test_importance_weights_are_truncated(surrogate: str) -> None:
    """The sampler gave tokens 1/4, 1 and twice of what the policy does: weights 2 of 4, 1 and 1/2, at ratio one."""
    _, gradient, metrics = one_member([FOUR, 0.0, HALF], 1.0, surrogate, importance_cap=2.0)
    np.testing.assert_allclose(gradient, [-2 / 3, -1 / 3, -0.5 / 3], rtol=1e-6)
    np.testing.assert_allclose(metrics["importance_weight"], 3.5 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["importance_capped"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["logprob_gap"], FOUR, rtol=1e-6)
    assert metrics["ratio_max"] == 1.0 and metrics["clip_fraction"] == 0.0


def test_importance_weights_are_constants(inputs: LossInputs) -> None:
    def total(proximal: jax.Array) -> jax.Array:
        return importance_weights(proximal, inputs.old_logprobs, inputs.mask, 1.5)[0].sum()

    assert total(inputs.logprobs) != total(inputs.old_logprobs)
    assert not jax.grad(total)(inputs.logprobs).any()


@pytest.mark.parametrize("surrogate", get_args(Surrogate))
def test_for_tokens_of_the_policy_itself_weights_change_nothing(inputs: LossInputs, surrogate: str) -> None:
    on_policy = dataclasses.replace(inputs, old_logprobs=inputs.logprobs)
    plain = dataclasses.replace(GRPO, surrogate=surrogate)

    def gradient(config: LossConfig) -> jax.Array:
        return jax.grad(lambda x: policy_loss(dataclasses.replace(on_policy, logprobs=x), config)[0])(inputs.logprobs)

    np.testing.assert_array_equal(gradient(dataclasses.replace(plain, importance_cap=2.0)), gradient(plain))


def test_statistics(inputs: LossInputs) -> None:
    metrics = policy_loss(inputs, GRPO)[1]
    gap = np.asarray(inputs.logprobs - inputs.old_logprobs)[np.asarray(inputs.mask)]
    for name, of in (("ratio_mean", np.mean), ("ratio_max", np.max), ("ratio_min", np.min)):
        np.testing.assert_allclose(metrics[name], of(np.exp(gap)), rtol=1e-6)
    np.testing.assert_allclose(metrics["logprob_gap"], np.abs(gap).max(), rtol=1e-6)


def test_shares_of_tokens_whose_gap_is_beyond_a_bound() -> None:
    """Ten tokens in the loss, gaps of either sign; one that is not in it has the largest."""
    gaps = [0.0, 0.01, -0.01, 0.03, -0.05, 0.09, -0.2, 0.5, 1.5, -3.0]
    zeros, mask = jnp.zeros((1, 1, 11)), jnp.asarray([[[True] * 10 + [False]]])
    logprobs = jnp.asarray(gaps + [9.0]).reshape(1, 1, 11)
    metrics = policy_loss(LossInputs(logprobs, zeros, zeros, zeros, jnp.ones((1, 1)), mask), GRPO)[1]
    for bound, share in (("0.02", 0.7), ("0.1", 0.4), ("1", 0.2)):
        np.testing.assert_allclose(metrics[f"logprob_gap_above_{bound}"], share, rtol=1e-6)


@pytest.mark.parametrize("config", [GRPO, DAPO, DR_GRPO], ids=["grpo", "dapo", "dr_grpo"])
def test_an_empty_mask_gives_zero(inputs: LossInputs, config: LossConfig) -> None:
    empty = dataclasses.replace(inputs, mask=jnp.zeros((B, G, R), bool))
    value, metrics = policy_loss(empty, config)
    assert value == 0.0 and metrics["clip_fraction"] == 0.0
    assert masked_mean(jnp.ones(3), jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize(
    ("estimator", "of"),
    [("k1", lambda x: x), ("k2", lambda x: x * x / 2), ("k3", lambda x: math.exp(-x) - 1 + x)],
    ids=["k1", "k2", "k3"],
)
def test_the_divergence_from_the_reference_is_punished(
    inputs: LossInputs, estimator: str, of: Callable[[float], float]
) -> None:
    config = dataclasses.replace(DAPO, kl_weight=0.3, kl_estimator=estimator)
    ratios = np.asarray(inputs.logprobs - inputs.reference_logprobs)[np.asarray(inputs.mask)]
    wanted = np.mean([of(float(x)) for x in ratios])
    value, metrics = policy_loss(inputs, config)
    np.testing.assert_allclose(value - policy_loss(inputs, DAPO)[0], 0.3 * wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], wanted, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_at_the_reference_the_divergence_has_no_gradient(inputs: LossInputs, estimator: str) -> None:
    at = dataclasses.replace(inputs, reference_logprobs=inputs.logprobs, advantages=jnp.zeros((B, G)))
    config = dataclasses.replace(GRPO, kl_weight=1.0, kl_estimator=estimator)
    gradient = jax.grad(lambda x: policy_loss(dataclasses.replace(at, logprobs=x), config)[0])(inputs.logprobs)
    assert not gradient.any()


def test_entropy_is_rewarded(inputs: LossInputs) -> None:
    wanted = np.asarray(inputs.entropy)[np.asarray(inputs.mask)].mean()
    gained = policy_loss(inputs, DAPO)[0] - policy_loss(inputs, dataclasses.replace(DAPO, entropy_weight=0.2))[0]
    np.testing.assert_allclose(gained, 0.2 * wanted, rtol=1e-5)
