"""Rotary positions: interleaved M-RoPE of the decoder and 2-D rope of the vision tower."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def mrope_axes(sections: tuple[int, int, int]) -> np.ndarray:
    """Which position axis (0 time, 1 height, 2 width) drives each rotary frequency, `[H / 2]`.

    Qwen3-VL interleaves the axes T H W T H W ... over the leading frequencies; the rest are time.
    """
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def mrope(positions: Array, theta: float, sections: tuple[int, int, int]) -> tuple[Array, Array]:
    """cos and sin `[..., H / 2]` (fp32) for positions `[..., 3]` (time, height, width)."""
    half = sum(sections)
    inverse = 1.0 / theta ** (np.arange(half, dtype=np.float32) / half)
    chosen = jnp.take(positions, jnp.asarray(mrope_axes(sections)), axis=-1).astype(jnp.float32)
    angles = chosen * inverse
    return jnp.cos(angles), jnp.sin(angles)


def vision_rope(positions: Array, head_dim: int) -> tuple[Array, Array]:
    """cos and sin `[..., head_dim / 2]` for patch positions `[..., 2]` (row, column)."""
    quarter = head_dim // 4
    inverse = 1.0 / 10_000.0 ** (np.arange(quarter, dtype=np.float32) / quarter)
    angles = positions.astype(jnp.float32)[..., None] * inverse  # [..., 2, head_dim / 4]
    angles = angles.reshape(*positions.shape[:-1], 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cos: Array, sin: Array, scale: float = 1.0) -> Array:
    """Rotates heads `[..., heads, H]` by angles `[..., H / 2]`; halves are paired, not neighbours.

    `scale`, for queries the softmax's 1 / sqrt(H), multiplies what is fp32 here: in bf16 it would be one more rounding.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (scale * turned).astype(x.dtype)
