"""Drawn tokens follow the distribution that their log-probabilities are given under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maestro_jax.rollout.sampling import sample

VOCABULARY, DRAWS = 12, 20_000
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCABULARY).astype(np.float32)
KEY = np.array([3, 5], np.uint32)
TEMPERATURES = (1.0, 0.7, 1.3)


def reference(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities `[V]`, written plainly."""
    found = np.exp(logits.astype(np.float64) / temperature)
    return found / found.sum()


def draw(temperature: float, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Many draws from the same logits: one lane a turn, one position after the other."""
    turns, positions = jnp.divmod(jnp.arange(DRAWS), 50)
    keys = jnp.broadcast_to(jnp.asarray(KEY), (DRAWS, 2))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, VOCABULARY))
    drawn = jax.jit(sample, static_argnums=5)(logits, keys, turns, positions, jnp.float32(noise), temperature)
    return np.asarray(drawn[0]), np.asarray(drawn[1])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_draws_follow_the_distribution(temperature: float) -> None:
    tokens, logprobs = draw(temperature)
    wanted = reference(LOGITS, temperature)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    likely = wanted * DRAWS > 5  # what chi-square asks for
    assert likely.sum() > 2 and wanted[likely].sum() > 0.99
    expected = wanted[likely] * counts[likely].sum() / wanted[likely].sum()
    assert stats.chisquare(counts[likely], expected).pvalue > 0.01
    np.testing.assert_allclose(logprobs, np.log(wanted[tokens]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_without_noise_the_likeliest_token_is_taken(temperature: float) -> None:
    tokens, logprobs = draw(temperature, noise=0.0)
    best = int(LOGITS.argmax())
    assert (tokens == best).all()
    np.testing.assert_allclose(logprobs, np.log(reference(LOGITS, temperature)[best]), atol=2e-6, rtol=0)


def test_a_draw_depends_on_key_turn_and_position_alone() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**32, (2, 3, 2), dtype=np.uint32)
    logits = rng.normal(0, 0.1, (2, 3, 200)).astype(np.float32)
    turn, position = rng.integers(0, 4, (2, 2, 3))
    noise, temperature = jnp.float32(1), 1.0
    tokens, logprobs = sample(logits, keys, turn, position, noise, temperature)
    for at in np.ndindex(2, 3):
        alone = sample(logits[at], keys[at], turn[at], position[at], noise, temperature)
        assert (int(tokens[at]), float(logprobs[at])) == (int(alone[0]), float(alone[1]))
    same = np.broadcast_to(logits[0, 0], (4, 200))
    keys = np.stack([keys[0, 0], keys[0, 0], keys[0, 0], keys[0, 1]])
    drawn, _ = sample(same, keys, np.array([0, 1, 0, 0]), np.array([0, 0, 1, 0]), noise, temperature)
    assert len(set(np.asarray(drawn).tolist())) == 4
