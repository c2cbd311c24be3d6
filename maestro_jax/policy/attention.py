"""Attention, exact, with nothing repeated for the members of a group.

`attend` is the plain form: queries over several segments of keys in one softmax, each segment with its own
batch structure. `attend_groups` and `attend_images` serve whole sequences and have backends (`BACKENDS`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maestro_jax.errors import ConfigError
from maestro_jax.policy.groups import GroupLayout
from maestro_jax.policy.splash import GroupMask, WholeMask, splash

Array = jax.Array

# einsum letters: b groups, g members, t queries, p keys, k KV heads, q query heads per KV head, h head size.
# Per rank of the keys: (layout of keys, layout of logit rows, axes that a mask of the segment lacks).
_LAYOUTS = {3: ("pkh", "kbgtq"), 4: ("bpkh", "bkgtq"), 5: ("bgpkh", "bgktq")}

BACKENDS = ("xla", "blocks", "splash", "splash_interpret")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How attention of whole sequences is computed; all backends give the same numbers up to rounding.

    Attributes:
      backend: "xla", all scores of a layer at once, the plain reference. "blocks": the same in blocks of queries,
        which skips keys that no query of a block sees. "splash": JAX's block-sparse flash attention for TPU, which
        never stores scores; "splash_interpret" runs that kernel's steps anywhere, slowly, for tests.
      recompute: whether "blocks" recomputes scores in the backward pass instead of keeping them.
      block: queries at a time in "blocks"; upper bound of a tile's sides in "splash".
    """

    backend: str = "xla"
    recompute: bool = False
    block: int = 512

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"attention {self.backend!r} is unknown; use one of {', '.join(BACKENDS)}")


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
    if config.backend.startswith("splash"):
        before = 0 if root is None else root[0].shape[0]
        if root is not None:
            k, v = (jnp.concatenate([_for_every_row(x, k), y], axis=1) for x, y in zip(root, (k, v), strict=True))
        interpret = config.backend == "splash_interpret"
        return splash(q, k, v, real, GroupMask(layout, before), scale, config.block, interpret)
    return _in_blocks(q, k, v, root, real, layout, scale, config)


def attend_images(q: Array, k: Array, v: Array, real: Array, scale: float, config: AttentionConfig) -> Array:
    """Every patch over all real patches of its image: `q, k, v [I, T, N, H]`, `real [I, T]` → `[I, T, N, H]`."""
    if config.backend.startswith("splash"):
        mask = WholeMask(q.shape[1])
        return splash(q, k, v, real, mask, scale, config.block, config.backend == "splash_interpret")
    own = Segment(k[:, None], v[:, None], real[:, None, None, :])
    block = config.block if config.backend == "blocks" else q.shape[1]
    rows = _keeper(config)(lambda q, own: attend(q[:, None], [own], scale)[:, 0])
    return jnp.concatenate([rows(q[:, i : i + block], own) for i in range(0, q.shape[1], block)], axis=1)


def _in_blocks(
    q: Array,
    k: Array,
    v: Array,
    root: tuple[Array, Array] | None,
    real: Array,
    layout: GroupLayout,
    scale: float,
    config: AttentionConfig,
) -> Array:
    """`attend_groups` by `attend`, a block of prefix tokens or some whole members at a time."""
    prefix, room = layout.prefix, layout.room
    block = config.block if config.backend == "blocks" else layout.length
    dtype = k.dtype
    # Summed over blocks, the gradients of keys and values are summed in fp32.
    root, k, v = jax.tree.map(lambda x: x.astype(jnp.float32), (root, k, v))

    def of_prefix(start: int, q: Array, root: Any, k: Array, v: Array) -> Array:
        stop = start + q.shape[1]
        keys, values = (x[:, :stop].astype(dtype)[:, None] for x in (k, v))
        rows, columns = jnp.arange(start, stop)[:, None], jnp.arange(stop)[None, :]
        mask = (columns <= rows) & real[:, None, :stop] | (columns == rows)
        return attend(q[:, None], [*_shared(root, dtype), Segment(keys, values, mask[:, None])], scale)[:, 0]

    def of_members(first: int, q: Array, root: Any, k: Array, v: Array) -> Array:
        last = first + q.shape[1] // room
        cut = slice(prefix + first * room, prefix + last * room)
        shape = (q.shape[0], last - first, room)
        own, values = (x[:, cut].astype(dtype).reshape(*shape, *x.shape[2:]) for x in (k, v))
        steps = jnp.arange(room)
        seen = (steps[None, :] <= steps[:, None]) & real[:, cut].reshape(*shape)[:, :, None, :]
        mask = seen | jnp.eye(room, dtype=bool)
        shared = Segment(k[:, :prefix].astype(dtype), v[:, :prefix].astype(dtype), real[:, :prefix])
        queries = q.reshape(*shape, *q.shape[2:])
        return attend(queries, [*_shared(root, dtype), shared, Segment(own, values, mask)], scale).reshape(q.shape)

    keep = _keeper(config)
    outs = []
    for start in range(0, prefix, block):
        stop = min(start + block, prefix)
        outs.append(keep(functools.partial(of_prefix, start))(q[:, start:stop], root, k, v))
    count = max(block // max(room, 1), 1)
    for first in range(0, layout.members, count):
        last = min(first + count, layout.members)
        rows = q[:, prefix + first * room : prefix + last * room]
        outs.append(keep(functools.partial(of_members, first))(rows, root, k, v))
    return jnp.concatenate(outs, axis=1)


def _keeper(config: AttentionConfig) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """What a block does about its scores: recompute them in the backward pass, or keep them."""
    return jax.checkpoint if config.backend == "blocks" and config.recompute else lambda block: block


def _shared(root: tuple[Array, Array] | None, dtype: jnp.dtype) -> list[Segment]:
    if root is None:
        return []
    keys, values = (x.astype(dtype) for x in root)
    return [Segment(keys, values, jnp.ones(keys.shape[0], bool))]


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
