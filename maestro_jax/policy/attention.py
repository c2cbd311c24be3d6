"""Attention over several segments of keys in one exact softmax.

The unit of work is the group: members `[B, G, ...]` attend to a root that all groups share, to
their group's prefix and to themselves. Each segment keeps its own batch structure, so the keys of
a prefix are never repeated for its members: all members of a group are rows of one matmul.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

# einsum letters: b groups, g members, t queries, p keys, k KV heads, q query heads per KV head, h head size.
# Per rank of the keys: (layout of keys, layout of logit rows, axes that a mask of the segment lacks).
_LAYOUTS = {3: ("pkh", "kbgtq"), 4: ("bpkh", "bkgtq"), 5: ("bgpkh", "bgktq")}


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
