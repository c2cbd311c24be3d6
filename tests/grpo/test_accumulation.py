"""A batch in parts: with the whole batch's denominator, their losses and gradients sum to the batch's."""

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.grpo.config import Aggregation, Surrogate
from maestro_jax.grpo.losses import (
    LossConfig,
    LossInputs,
    aggregate,
    count_loss,
    loss_denominator,
    policy_loss,
)

B, G, R = 6, 3, 8
# Groups of each part: whole, halves, one by one, uneven and out of order.
SPLITS = [[range(6)], [range(3), range(3, 6)], [[b] for b in range(6)], [[4], [0, 5, 2], [1, 3]]]
LOSSES = [
    LossConfig(0.2, 0.28, aggregation, 16, 0.01, 0.1, "k3", surrogate, cap)
    for aggregation, surrogate, cap in itertools.product(get_args(Aggregation), get_args(Surrogate), (0.0, 1.5))
]


def batch() -> LossInputs:
    """Members from no token to R, and a group that failed as a whole; in float64, where rounding hides nothing."""
    rng = np.random.default_rng(0)
    old = rng.uniform(-3, 0, (B, G, R))
    new, reference = old + rng.normal(0, 0.3, old.shape), old + rng.normal(0, 0.5, old.shape)
    mask = np.arange(R) < rng.integers(0, R + 1, (B, G, 1))
    mask[0], mask[1], mask[2] = False, np.arange(R) < 1, True
    entropy, advantages = rng.uniform(0, 2, old.shape), rng.standard_normal((B, G))
    return LossInputs(*map(jnp.asarray, (new, entropy, old, reference, advantages, mask)))


def part(inputs: LossInputs, groups: list[int]) -> LossInputs:
    """Some groups, cut to their longest member as its bucket would."""
    width = max(int(inputs.mask[jnp.asarray(groups)].sum(axis=-1).max()), 1)
    return jax.tree.map(lambda x: x[jnp.asarray(groups), :, :width] if x.ndim == 3 else x[jnp.asarray(groups)], inputs)


def value_and_grad(inputs: LossInputs, config: LossConfig, denominator: jax.Array | None) -> tuple[float, np.ndarray]:
    """The loss, and its gradient `[groups, G, R]`."""

    def loss(logprobs: jax.Array) -> jax.Array:
        return policy_loss(dataclasses.replace(inputs, logprobs=logprobs), config, denominator)[0]

    value, gradient = jax.value_and_grad(loss)(inputs.logprobs)
    padded = np.zeros((*gradient.shape[:2], R))
    padded[..., : gradient.shape[2]] = gradient
    return float(value), padded


@pytest.mark.parametrize("config", LOSSES, ids=lambda c: f"{c.surrogate}-{c.aggregation}-{c.importance_cap}")
def test_parts_sum_to_the_batch(config: LossConfig) -> None:
    with jax.enable_x64(True):
        whole = batch()
        denominator = loss_denominator(count_loss(whole.mask), config)
        wanted, wanted_gradient = value_and_grad(whole, config, None)
        for split in SPLITS:
            value, gradient = 0.0, np.zeros((B, G, R))
            for groups in map(list, split):
                found, gradient[groups] = value_and_grad(part(whole, groups), config, denominator)
                value += found
            np.testing.assert_allclose(value, wanted, rtol=1e-13)
            np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_a_mean_over_uneven_parts_would_be_another_loss(aggregation: str) -> None:
    """The parts here differ in tokens and in members, so the comparison above is not empty."""
    whole, config = batch(), LossConfig(0.2, 0.2, aggregation, 16)
    parts = [policy_loss(part(whole, list(groups)), config)[0] for groups in SPLITS[3]]
    assert abs(np.mean(parts) / policy_loss(whole, config)[0] - 1) > 0.01


@pytest.mark.parametrize(("aggregation", "wanted"), [("sequence", 3), ("token", 6), ("constant", 3 * 16)])
def test_denominators(aggregation: str, wanted: int) -> None:
    mask = jnp.arange(4) < jnp.array([[4, 1], [0, 1]])[..., None]
    config = LossConfig(0.2, 0.2, aggregation, 16)
    assert loss_denominator(count_loss(mask), config) == wanted
    # by hand: tokens of loss 1 give 1 per member, 1 per token, tokens / 16 per member
    assert aggregate(jnp.ones((2, 2, 4)), mask, config) == (6 / 48 if aggregation == "constant" else 1.0)
    assert loss_denominator(count_loss(jnp.zeros((2, 2, 4), bool)), config) > 0
