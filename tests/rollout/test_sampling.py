"""Drawn tokens follow the distribution that their log-probabilities are given under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from maestro_jax.rollout import sampling
from maestro_jax.rollout.sampling import SamplingConfig, sample

VOCABULARY, DRAWS = 12, 20_000
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCABULARY).astype(np.float32)
KEY = np.array([3, 5], np.uint32)
CONFIGS = {
    "plain": SamplingConfig(),
    "cooler": SamplingConfig(temperature=0.7),
    "top-k": SamplingConfig(top_k=4),
    "top-p": SamplingConfig(top_p=0.8),
    "all of it": SamplingConfig(temperature=1.3, top_k=6, top_p=0.9),
}


def reference(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Probabilities `[V]`, written plainly: sort, cut, normalise."""
    x = logits.astype(np.float64) / config.temperature
    order = np.argsort(-x, kind="stable")
    last = order[min(config.top_k or len(order), len(order)) - 1]
    allowed = order[x[order] >= x[last]]  # with those that equal the last one, as transformers does it
    p = np.exp(x[allowed] - x[allowed].max())
    p /= p.sum()
    kept = allowed[: 1 + int((np.cumsum(p) < config.top_p).sum())] if config.top_p < 1 else allowed
    found = np.zeros(len(x))
    found[kept] = np.exp(x[kept] - x[kept].max())
    return found / found.sum()


def draw(config: SamplingConfig, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Many draws from the same logits: one lane a turn, one position after the other."""
    turns, positions = jnp.divmod(jnp.arange(DRAWS), 50)
    keys = jnp.broadcast_to(jnp.asarray(KEY), (DRAWS, 2))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (DRAWS, VOCABULARY))
    drawn = jax.jit(sample, static_argnums=5)(logits, keys, turns, positions, jnp.float32(noise), config)
    return np.asarray(drawn[0]), np.asarray(drawn[1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_draws_follow_the_distribution(config: SamplingConfig) -> None:
    tokens, logprobs = draw(config)
    wanted = reference(LOGITS, config)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert not counts[wanted == 0].any()
    likely = wanted * DRAWS > 5  # what chi-square asks for
    assert likely.sum() > 2 and wanted[likely].sum() > 0.99
    expected = wanted[likely] * counts[likely].sum() / wanted[likely].sum()
    assert stats.chisquare(counts[likely], expected).pvalue > 0.01
    np.testing.assert_allclose(logprobs, np.log(wanted[tokens]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_without_noise_the_likeliest_token_is_taken(config: SamplingConfig) -> None:
    tokens, logprobs = draw(config, noise=0.0)
    best = int(LOGITS.argmax())
    assert (tokens == best).all()
    np.testing.assert_allclose(logprobs, np.log(reference(LOGITS, config)[best]), atol=2e-6, rtol=0)


# Multiples of 1/8, some equal; of those equal to the last one within top-p the reference keeps some, we keep all.
LEVELS = npst.arrays(np.float32, 9, elements=st.integers(-40, 40).map(lambda level: level / 8))


@settings(max_examples=60, deadline=None)
@given(logits=LEVELS, top_k=st.integers(0, 12), top_p=st.sampled_from([0.05, 0.3, 0.6, 0.95, 1.0]))
def test_what_may_be_drawn_is_what_a_sorted_list_says(logits: np.ndarray, top_k: int, top_p: float) -> None:
    config = SamplingConfig(1.0, top_k, top_p)
    lowest = logits[reference(logits, config) > 0].min()
    found = np.asarray(sampling._truncate(jnp.asarray(logits), config))
    np.testing.assert_array_equal(found, np.where(logits >= lowest, logits, -np.inf))


def test_a_draw_depends_on_key_turn_and_position_alone() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**32, (2, 3, 2), dtype=np.uint32)
    logits = rng.normal(0, 0.1, (2, 3, 200)).astype(np.float32)
    turn, position = rng.integers(0, 4, (2, 2, 3))
    noise, config = jnp.float32(1), SamplingConfig()
    tokens, logprobs = sample(logits, keys, turn, position, noise, config)
    for at in np.ndindex(2, 3):
        alone = sample(logits[at], keys[at], turn[at], position[at], noise, config)
        assert (int(tokens[at]), float(logprobs[at])) == (int(alone[0]), float(alone[1]))
    same = np.broadcast_to(logits[0, 0], (4, 200))
    keys = np.stack([keys[0, 0], keys[0, 0], keys[0, 0], keys[0, 1]])
    drawn, _ = sample(same, keys, np.array([0, 1, 0, 0]), np.array([0, 0, 1, 0]), noise, config)
    assert len(set(np.asarray(drawn).tolist())) == 4
