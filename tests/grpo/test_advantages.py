"""Group advantages against a plain loop over groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from maestro_jax.grpo.advantages import group_advantages

EPSILON = 1e-6
SHAPE = (3, 5)
# Rewards as they occur: sums of outcome, format and small costs.
REWARDS = npst.arrays(np.float64, SHAPE, elements=st.sampled_from([-1.0, 0.0, 1.0, 0.25, -0.7, 1.001]))
VALID = npst.arrays(bool, SHAPE)


def plain(rewards: list[float], normaliser: str) -> list[float]:
    """Advantages of the valid members of one group, by the papers' formulas."""
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    if normaliser == "leave_one_out":
        return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    deviation = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (deviation + EPSILON) if normaliser == "std" else r - mean for r in rewards]


@pytest.mark.parametrize("normaliser", ["std", "none", "leave_one_out"])
@given(REWARDS, VALID)
def test_advantages_are_those_of_a_plain_loop(normaliser: str, rewards: np.ndarray, valid: np.ndarray) -> None:
    found, contrast = group_advantages(rewards, valid, normaliser, EPSILON)
    wanted = np.zeros(SHAPE)
    for group in range(SHAPE[0]):
        wanted[group, valid[group]] = plain(rewards[group, valid[group]].tolist(), normaliser)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert contrast.tolist() == [len(set(rewards[g, valid[g]])) > 1 for g in range(SHAPE[0])]


@pytest.mark.parametrize("normaliser", ["std", "none", "leave_one_out"])
def test_an_invalid_member_cannot_move_the_others(normaliser: str) -> None:
    valid = np.array([[True, True, True, False]])
    low, high = (
        group_advantages(np.array([[1.0, 0.0, 0.0, spoiled]]), valid, normaliser)[0] for spoiled in (-1e6, np.nan)
    )
    np.testing.assert_array_equal(low, high)
    assert low[0, 3] == 0.0


@pytest.mark.parametrize("normaliser", ["std", "none", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(normaliser: str) -> None:
    rewards = np.full((1, 7), 0.1)  # 0.1 is not a binary fraction: its mean is off by rounding
    found, contrast = group_advantages(rewards, np.ones((1, 7), bool), normaliser)
    assert not found.any() and not contrast.any()
