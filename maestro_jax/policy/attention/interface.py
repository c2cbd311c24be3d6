"""Attention of whole sequences, exact, with nothing repeated for the members of a group.

"blocks" computes it in parts (`merge.py`) by a kernel (`KERNELS`); splash has one masked kernel for a whole row.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maestro_jax.errors import ConfigError
from maestro_jax.policy.attention import merge
from maestro_jax.policy.attention.blocks import Blocks
from maestro_jax.policy.attention.groups import GroupLayout
from maestro_jax.policy.attention.splash import GroupMask, WholeMask, splash

Array = jax.Array

# Name of a backend → what makes its kernel of `AttentionConfig.block`.
KERNELS: dict[str, Callable[[int], merge.Kernel]] = {"blocks": Blocks}
BACKENDS = (*KERNELS, "splash", "splash_interpret")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention of whole sequences is computed; all backends give the same numbers up to rounding.

    Attributes:
      backend: "blocks" (`blocks.py`) keeps no scores, and skips keys that no query of a block sees. "splash": JAX's
        block-sparse flash attention for TPU; "splash_interpret" runs that kernel's steps anywhere, slowly, for tests.
      block: queries at a time in "blocks"; upper bound of a tile's sides in "splash".
    """

    backend: str = "blocks"
    block: int = 512

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"attention {self.backend!r} is unknown; use one of {', '.join(BACKENDS)}")


def suited_to(platform: str) -> AttentionConfig:
    """What suits devices of a platform ("cpu", "gpu", "tpu"); on a CPU a block's scores should stay in its cache."""
    if platform == "tpu":
        return AttentionConfig("splash")
    return AttentionConfig("blocks", block=128 if platform == "cpu" else 512)


def attend_groups(
    q: Array,
    k: Array,
    v: Array,
    root: tuple[Array, Array] | None,
    real: Array,
    layout: GroupLayout,
    config: AttentionConfig,
) -> Array:
    """Every group's tokens over the root and over what they may see of their own row.

    Args:
      q: `[B, T, N, H]`, scaled by 1 / sqrt(H) where they were fp32 (`rope.rotate`); T as in `layout`.
      k, v: `[B, T, K, H]`.
      root: keys and values `[P0, K, H]` that stand before every row, None if there are none.
      real: bool `[B, T]`; other tokens are padding, which no real token sees, whatever stands there (NaN too).

    Returns:
      `[B, T, N, H]` in the dtype of the queries; rows of padding hold something finite.
    """
    q, k, v = _only_real(real, q, k, v)
    before = 0 if root is None else root[0].shape[0]
    if root is not None:
        k, v = (jnp.concatenate([_for_every_row(x, k), y], axis=1) for x, y in zip(root, (k, v), strict=True))
    if config.backend in KERNELS:
        return _in_parts(q, k, v, real, layout.parts(before), config)
    mask = GroupMask(layout, before, config.block)
    return splash(q, k, v, real, mask, config.backend == "splash_interpret")


def attend_images(q: Array, k: Array, v: Array, real: Array, config: AttentionConfig) -> Array:
    """Every patch over all real patches of its image: `q, k, v [I, T, N, H]`, `real [I, T]` → `[I, T, N, H]`.

    Queries come scaled, as in `attend_groups`.
    """
    q, k, v = _only_real(real, q, k, v)
    patches = q.shape[1]
    if config.backend in KERNELS:
        return _in_parts(q, k, v, real, (merge.Part((0, patches), (0, patches)),), config)
    return splash(q, k, v, real, WholeMask(patches, config.block), config.backend == "splash_interpret")


def _only_real(real: Array, *arrays: Array) -> tuple[Array, ...]:
    """Arrays `[B, T, ...]` with zeros on padding: a weight of zero times NaN is NaN, forwards and backwards."""
    return tuple(jnp.where(real[..., None, None], x, 0) for x in arrays)


def _in_parts(
    q: Array, k: Array, v: Array, real: Array, parts: tuple[merge.Part, ...], config: AttentionConfig
) -> Array:
    """`q [B, T, N, H]`, `k, v [B, before + T, K, H]`, `real [B, T]`: those before are real."""
    seen = jnp.pad(real, ((0, 0), (k.shape[1] - q.shape[1], 0)), constant_values=True)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return merge.attend(q, k, v, seen, parts, KERNELS[config.backend](config.block)).swapaxes(1, 2)


def _for_every_row(root: Array, rows: Array) -> Array:
    """The root before every row; in fp32, because its gradient is a sum over rows."""
    return jnp.broadcast_to(root[None].astype(jnp.float32), (rows.shape[0], *root.shape)).astype(root.dtype)
