"""Attention, exact, with nothing repeated for the members of a group.

`attend` is the plain form: queries over several segments of keys in one softmax, each segment with its own
batch structure. `attend_groups` and `attend_images` serve whole sequences and have backends (`BACKENDS`).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maestro_jax.errors import ConfigError
from maestro_jax.policy.attention.blocks import Plan, attend_in_blocks
from maestro_jax.policy.attention.groups import GroupLayout, causal
from maestro_jax.policy.attention.splash import GroupMask, WholeMask, splash

Array = jax.Array

# einsum letters: b groups, g members, t queries, p keys, k KV heads, q query heads per KV head, h head size.
# Per rank of the keys: (layout of keys, layout of logit rows, axes that a mask of the segment lacks).
_LAYOUTS = {3: ("pkh", "kbgtq"), 4: ("bpkh", "bkgtq"), 5: ("bgpkh", "bgktq")}

BACKENDS = ("xla", "blocks", "splash", "splash_interpret")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention of whole sequences is computed; all backends give the same numbers up to rounding.

    Attributes:
      backend: "xla", all scores of a layer at once, differentiated by JAX: the plain reference. "blocks"
        (`blocks.py`) keeps no scores, and skips keys that no query of a block sees. "splash": JAX's block-sparse
        flash attention for TPU; "splash_interpret" runs that kernel's steps anywhere, slowly, for tests.
      block: tokens at a time in "blocks"; upper bound of a tile's sides in "splash".
    """

    backend: str = "xla"
    block: int = 512

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"attention {self.backend!r} is unknown; use one of {', '.join(BACKENDS)}")


def suited_to(platform: str) -> AttentionConfig:
    """What suits devices of a platform ("cpu", "gpu", "tpu"); on a CPU a block's scores should stay in its cache."""
    if platform == "tpu":
        return AttentionConfig("splash")
    return AttentionConfig("blocks", block=128 if platform == "cpu" else 512)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Keys and values of one layer that queries may attend to.

    Attributes:
      keys, values: `[P, K, H]` shared by all, `[B, P, K, H]` per group or `[B, G, P, K, H]` per member.
      mask: True where a key may be seen: `[P]`, `[B, P]` or `[B, G, T, P]` (T may be 1).
    """

    keys: Array
    values: Array
    mask: Array


def attend_groups(
    q: Array,
    k: Array,
    v: Array,
    root: tuple[Array, Array] | None,
    real: Array,
    layout: GroupLayout,
    scale: float,
    config: AttentionConfig,
) -> Array:
    """Every group's tokens over the root and over what they may see of their own row.

    Args:
      q: `[B, T, N, H]`, T as in `layout`.
      k, v: `[B, T, K, H]`.
      root: keys and values `[P0, K, H]` that stand before every row, None if there are none.
      real: bool `[B, T]`; other tokens are padding, which no real token sees.
      scale: multiplies the logits, 1 / sqrt(H).

    Returns:
      `[B, T, N, H]` in the dtype of the queries; rows of padding hold something finite.
    """
    if config.backend == "xla":
        return _plain(q, k, v, root, real, layout, scale)
    before = 0 if root is None else root[0].shape[0]
    if root is not None:
        k, v = (jnp.concatenate([_for_every_row(x, k), y], axis=1) for x, y in zip(root, (k, v), strict=True))
    if config.backend == "blocks":
        plan = Plan(layout, before, False, q.shape[2] // k.shape[2], config.block)
        return attend_in_blocks(q, k, v, real, scale, plan)
    return splash(q, k, v, real, GroupMask(layout, before), scale, config.block, config.backend == "splash_interpret")


def attend_images(q: Array, k: Array, v: Array, real: Array, scale: float, config: AttentionConfig) -> Array:
    """Every patch over all real patches of its image: `q, k, v [I, T, N, H]`, `real [I, T]` → `[I, T, N, H]`."""
    patches = q.shape[1]
    if config.backend == "xla":
        return attend(q[:, None], [Segment(k[:, None], v[:, None], real[:, None, None, :])], scale)[:, 0]
    if config.backend == "blocks":
        plan = Plan(causal(patches), 0, True, 1, config.block)
        return attend_in_blocks(q, k, v, real, scale, plan)
    return splash(q, k, v, real, WholeMask(patches), scale, config.block, config.backend == "splash_interpret")


def _plain(
    q: Array,
    k: Array,
    v: Array,
    root: tuple[Array, Array] | None,
    real: Array,
    layout: GroupLayout,
    scale: float,
) -> Array:
    """`attend_groups` by `attend`."""
    prefix = layout.prefix
    everybody = [] if root is None else [Segment(*root, jnp.ones(root[0].shape[0], bool))]
    mask = (_causal(prefix) & real[:, None, :prefix] | jnp.eye(prefix, dtype=bool))[:, None]
    own = Segment(k[:, None, :prefix], v[:, None, :prefix], mask)
    out = attend(q[:, None, :prefix], [*everybody, own], scale)[:, 0]
    if not layout.members:
        return out
    shared = Segment(k[:, :prefix], v[:, :prefix], real[:, :prefix])
    mask = _causal(layout.room) & layout.of_members(real)[:, :, None, :] | jnp.eye(layout.room, dtype=bool)
    own = Segment(layout.of_members(k), layout.of_members(v), mask)
    return layout.join(out, attend(layout.of_members(q), [*everybody, shared, own], scale))


def _causal(length: int) -> Array:
    return jnp.tril(jnp.ones((length, length), bool))


def _for_every_row(root: Array, rows: Array) -> Array:
    return jnp.broadcast_to(root[None], (rows.shape[0], *root.shape))


def attend(queries: Array, segments: Sequence[Segment], scale: float) -> Array:
    """Softmax attention over the concatenation of all segments, without concatenating them.

    Plain differentiable jnp: the maximum is the joint one, so the gradient is that of one softmax
    (merging separately normalised parts through a kernel that drops the gradient of its
    log-sum-exp would silently be wrong).

    Args:
      queries: `[B, G, T, N, H]`.
      segments: at least one; every query must see at least one key.
      scale: multiplies the logits, 1 / sqrt(H).

    Returns:
      `[B, G, T, N, H]` in the dtype of the queries; softmax in fp32.
    """
    b, g, t, n, h = queries.shape
    kv_heads = segments[0].keys.shape[-2]
    q = queries.reshape(b, g, t, kv_heads, n // kv_heads, h) * scale
    logits = [_logits(q, segment) for segment in segments]
    rows = [_LAYOUTS[segment.keys.ndim][1] for segment in segments]
    peaks = [jnp.einsum(f"{r}->bgtkq", jnp.max(x, axis=-1)) for x, r in zip(logits, rows, strict=True)]
    peak = jax.lax.stop_gradient(jnp.max(jnp.stack(peaks), axis=0))
    total = jnp.zeros((), jnp.float32)
    output = jnp.zeros((), jnp.float32)
    for x, r, segment in zip(logits, rows, segments, strict=True):
        weights = jnp.exp(x - jnp.einsum(f"bgtkq->{r}", peak)[..., None])
        total = total + jnp.einsum(f"{r}->bgtkq", jnp.sum(weights, axis=-1))
        layout = _LAYOUTS[segment.keys.ndim][0]
        output = output + jnp.einsum(
            f"{r}p,{layout}->bgtkqh",
            weights.astype(segment.values.dtype),
            segment.values,
            preferred_element_type=jnp.float32,
        )
    output = output / total[..., None]
    return output.reshape(b, g, t, n, h).astype(queries.dtype)


def _logits(q: Array, segment: Segment) -> Array:
    layout, rows = _LAYOUTS[segment.keys.ndim]
    x = jnp.einsum(f"bgtkqh,{layout}->{rows}p", q, segment.keys, preferred_element_type=jnp.float32)
    if segment.keys.ndim == 3:
        mask = segment.mask
    elif segment.keys.ndim == 4:
        mask = segment.mask[:, None, None, None, None, :]
    else:
        mask = segment.mask[:, :, None, :, None, :]
    # Finite, so that a row whose keys in this segment are all masked contributes exp(-huge) = 0, not NaN.
    return jnp.where(mask, x, -1e30)
