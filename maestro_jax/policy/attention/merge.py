"""The seam of attention: one softmax in parts, each with its log-sum-exp.

What queries may see stands in several places: a group's prefix, a member's own tokens, in decoding caches as well. A
part is the attention over one of these places alone. It gives a pair: its output, and the log of the sum of its
exponentials. `merge` makes the pair of the whole softmax of the pairs of its parts, in fp32.

The backward pass of each part gets the merged pair. `exp(scores - lse)` are then the weights of the whole softmax, and
the gradients of a part's own keys need nothing else of the others. (Differentiating through `merge` instead is silently
wrong, by parts of one, where a kernel drops the gradient of its log-sum-exp, as flash kernels do.)

So a kernel for another chip is one file with a `Kernel`, which knows neither groups nor members, and a name for it in
`interface.py`. `blocks.py` is one in plain JAX.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
Pair = tuple[Array, Array]  # fp32: outputs [..., H], log-sum-exps [...]

_MASKED = -1e30  # finite: a query that sees nothing in one part weighs exp(-huge) = 0 there, not NaN


class Kernel(Protocol):
    """How a part is computed. Instances are static: hashable, and equal where they compute the same.

    Letters: N heads of queries and K of keys (N / K in a row share one), t queries, s keys, H head size. A query sees
    the keys in `seen`, bool `[b, s]`; if `causal`, only the first s - t + 1 of them for the first query, one more for
    the next, and all for the last. Logits are `q @ k`: the queries come scaled.
    """

    def forward(self, q: Array, k: Array, v: Array, seen: Array, causal: bool) -> Pair:
        """`q [b, N, t, H]`, `k, v [b, K, s, H]` → `[b, N, t, H]` and fp32 `[b, N, t]`; finite for who sees nothing."""

    def backward(
        self, q: Array, k: Array, v: Array, seen: Array, causal: bool, out: Array, lse: Array, gradient: Array
    ) -> tuple[Array, Array, Array]:
        """Gradients of q, k and v from those of `out [b, N, t, H]`; `out` and `lse` are those of the whole softmax."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Which queries see which keys; all static.

    Attributes:
      queries, keys: first and last + 1.
      causal: as in `Kernel`.
      sequences: into how many of equal length both fall apart; each query sees keys of its own sequence only.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    sequences: int = 1

    def of_queries(self, x: Array) -> Array:
        """`[B, N, T, ...]` → `[B * sequences, N, t, ...]`."""
        return self._apart(x[:, :, slice(*self.queries)])

    def of_keys(self, x: Array) -> Array:
        """`[B, K, S, ...]` → `[B * sequences, K, s, ...]`."""
        return self._apart(x[:, :, slice(*self.keys)])

    def _apart(self, x: Array) -> Array:
        if self.sequences == 1:
            return x
        b, heads, tokens, *rest = x.shape
        apart = x.reshape(b, heads, self.sequences, tokens // self.sequences, *rest).swapaxes(1, 2)
        return apart.reshape(b * self.sequences, heads, -1, *rest)

    def together(self, x: Array) -> Array:
        """`[B * sequences, N, t, ...]` → `[B, N, sequences * t, ...]`."""
        if self.sequences == 1:
            return x
        b, heads, tokens, *rest = x.shape
        together = x.reshape(b // self.sequences, self.sequences, heads, tokens, *rest).swapaxes(1, 2)
        return together.reshape(b // self.sequences, heads, self.sequences * tokens, *rest)


def masked(scores: Array, mask: Array) -> Array:
    return jnp.where(mask, scores, _MASKED)


def softmaxed(scores: Array, values: Array) -> Pair:
    """The pair of a part: scores fp32 `[..., rows, keys]` and values `[..., keys, H]`."""
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out / total[..., None], peak + jnp.log(total)


def merge(pairs: Sequence[Pair]) -> Pair:
    """The pair of a softmax over all keys, from those of its parts."""
    if len(pairs) == 1:
        return pairs[0]
    peak = functools.reduce(jnp.maximum, (lse for _, lse in pairs))
    shares = [jnp.exp(lse - peak) for _, lse in pairs]
    total = functools.reduce(jnp.add, shares)
    out = functools.reduce(
        jnp.add, (share[..., None] * out.astype(jnp.float32) for share, (out, _) in zip(shares, pairs, strict=True))
    )
    return out / total[..., None], peak + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(q: Array, k: Array, v: Array, seen: Array, parts: tuple[Part, ...], kernel: Kernel) -> Array:
    """Attention in parts, with a backward pass in parts.

    Args:
      q: `[B, N, T, H]`, scaled.
      k, v: `[B, K, S, H]`.
      seen: bool `[B, S]`, which keys may be seen at all.
      parts: those of the same queries have the same `queries`, and these are in order, without gaps.

    Returns:
      `[B, N, T, H]` in the dtype of the queries.
    """
    return _forward(q, k, v, seen, parts, kernel)[0]


def _forward(
    q: Array, k: Array, v: Array, seen: Array, parts: tuple[Part, ...], kernel: Kernel
) -> tuple[Array, tuple[Array, ...]]:
    found: dict[tuple[int, int], list[Pair]] = {}
    for part in parts:
        out, lse = kernel.forward(part.of_queries(q), *_keys(part, k, v, seen), part.causal)
        found.setdefault(part.queries, []).append((part.together(out), part.together(lse)))
    outs, sums = zip(*map(merge, found.values()), strict=True)
    out, lse = jnp.concatenate([out.astype(q.dtype) for out in outs], axis=2), jnp.concatenate(sums, axis=2)
    return out, (q, k, v, seen, out, lse)


def _backward(
    parts: tuple[Part, ...], kernel: Kernel, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, seen, out, lse = residuals
    dqs: dict[tuple[int, int], Array] = {}
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)  # many queries add to a shared key
    for part in parts:
        merged = (part.of_queries(x) for x in (out, lse, gradient))
        more = kernel.backward(part.of_queries(q), *_keys(part, k, v, seen), part.causal, *merged)
        dq, more_k, more_v = (part.together(x).astype(jnp.float32) for x in more)
        dqs[part.queries] = dqs[part.queries] + dq if part.queries in dqs else dq
        dk, dv = (add_at(x, part.keys[0], y, axis=2) for x, y in ((dk, more_k), (dv, more_v)))
    return jnp.concatenate(list(dqs.values()), axis=2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _keys(part: Part, k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
    return part.of_keys(k), part.of_keys(v), part.of_keys(seen[:, None])[:, 0]


def add_at(x: Array, start: int, more: Array, axis: int) -> Array:
    """`x` with `more` added to it from `start` on."""
    sums = jax.lax.slice_in_dim(x, start, start + more.shape[axis], axis=axis) + more
    return jax.lax.dynamic_update_slice_in_dim(x, sums, start, axis)
