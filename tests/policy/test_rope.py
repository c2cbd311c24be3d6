"""Rotary positions against transformers' own functions."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from maestro_jax.policy.rope import mrope, mrope_axes, rotate, vision_rope


@pytest.mark.parametrize("sections", [(24, 20, 20), (4, 2, 2), (6, 5, 5)], ids=str)
def test_interleaved_axes_are_those_of_transformers(sections: tuple[int, int, int]) -> None:
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Reference

    half = sum(sections)
    axis_numbers = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, half).clone()
    wanted = Reference.recomposition_frequencies(SimpleNamespace(mrope_section=sections), axis_numbers)[0, 0, :half]
    assert mrope_axes(sections).tolist() == wanted.int().tolist()


def test_the_released_models_axes_count_up_to_their_sections() -> None:
    axes = mrope_axes((24, 20, 20))
    assert np.bincount(axes).tolist() == [24, 20, 20]
    assert axes[:6].tolist() == [0, 1, 2, 0, 1, 2] and axes[60:].tolist() == [0, 0, 0, 0]


def test_text_positions_give_plain_rope() -> None:
    positions = np.repeat(np.array([[0], [3], [1000]]), 3, axis=1)
    cos, sin = mrope(positions, 5e6, (24, 20, 20))
    angles = positions[:, :1] * 5e6 ** (-np.arange(64) / 64)
    # cos and sin of angles up to 1000 in fp32: the angle itself is rounded to 6e-5
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-4)


def test_vision_rope_turns_rows_in_the_first_half_and_columns_in_the_second() -> None:
    cos, sin = vision_rope(np.array([[2, 0], [0, 5]]), 16)
    inverse = 10_000.0 ** (-np.arange(4) / 4)
    still = np.zeros(4)
    np.testing.assert_allclose(sin, np.sin([[*(2 * inverse), *still], [*still, *(5 * inverse)]]), atol=1e-6)
    np.testing.assert_allclose(cos, np.cos([[*(2 * inverse), *still], [*still, *(5 * inverse)]]), atol=1e-6)


def test_rotation_depends_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 16)).astype(np.float32)

    def score(at: int, by: int) -> float:
        angles = [mrope(np.full((3,), p), 10_000.0, (4, 2, 2)) for p in (at, by)]
        return float((rotate(q, *angles[0]) * rotate(k, *angles[1])).sum())

    assert abs(score(3, 1) - score(103, 101)) < 1e-4  # fp32 angles of 100 rounded to 8e-6
    assert abs(score(3, 1) - score(3, 2)) > 1e-2


def test_queries_are_scaled_before_they_are_rounded() -> None:
    """In bf16 the scale was a second rounding, 1.7e-3 of a query (rms); only one scale in four is a power of two."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 3, 128)), jnp.bfloat16)
    cos, sin = mrope(np.arange(150).reshape(50, 3), 5e6, (24, 20, 20))
    exact = rotate(x.astype(jnp.float32), cos, sin) * np.float32(128**-0.5)
    found = rotate(x, cos, sin, 128**-0.5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8)  # half a last bit, the fp32 sum's besides
    twice = (rotate(x, cos, sin) * 128**-0.5).astype(jnp.float32)
    assert np.abs(twice / exact - 1).max() > 1.2 * 2**-8
