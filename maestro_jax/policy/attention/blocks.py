"""Parts of attention in blocks of queries, in plain JAX, on any device.

The backward pass computes the scores again from the merged log-sum-exp (Dao et al. 2022, arXiv 2205.14135), so no more
than a block of them exists. All products are written as plain [m, k] x [k, n], because a compiler that has to turn a
block of scores round pays more for it than for the product (seen with XLA on CPUs).

Rows are `heads of one KV head x queries of a block`: all that share keys are rows of one matrix.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from maestro_jax.policy.attention.merge import Pair, add_at, masked, softmaxed

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A `merge.Kernel`. `size` queries at a time, over all keys that one of them may see."""

    size: int

    def forward(self, q: Array, k: Array, v: Array, seen: Array, causal: bool) -> Pair:
        kt = k.swapaxes(2, 3)
        outs, sums = [], []
        for start, stop, keys in self._blocks(q, k, causal):
            rows = _folded(q[:, :, start:stop], k)
            scores = masked(_product(rows, kt[..., :keys]), _mask(rows, q, seen, causal, start, keys))
            out, lse = softmaxed(scores, v[:, :, :keys])
            outs.append(_unfolded(out, q))
            sums.append(_unfolded(lse, q))
        return jnp.concatenate(outs, axis=2), jnp.concatenate(sums, axis=2)

    def backward(
        self, q: Array, k: Array, v: Array, seen: Array, causal: bool, out: Array, lse: Array, gradient: Array
    ) -> tuple[Array, Array, Array]:
        """All three in fp32."""
        kt, vt = k.swapaxes(2, 3), v.swapaxes(2, 3)
        # What the softmax takes off the gradients of all weights of a row.
        delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        dkt, dvt = jnp.zeros(kt.shape, jnp.float32), jnp.zeros(vt.shape, jnp.float32)
        dqs = []
        for start, stop, keys in self._blocks(q, k, causal):
            rows, of_rows, sums, deltas = (_folded(x[:, :, start:stop], k) for x in (q, gradient, lse, delta))
            scores = masked(_product(rows, kt[..., :keys]), _mask(rows, q, seen, causal, start, keys))
            weights = jnp.exp(scores - sums[..., None])
            ds = (weights * (_product(of_rows, vt[..., :keys]) - deltas[..., None])).astype(q.dtype)
            dqs.append(_unfolded(_product(ds, k[:, :, :keys]), q))
            dkt = add_at(dkt, 0, _product(rows.swapaxes(-1, -2), ds), axis=3)
            dvt = add_at(dvt, 0, _product(of_rows.swapaxes(-1, -2), weights.astype(q.dtype)), axis=3)
        return jnp.concatenate(dqs, axis=2), dkt.swapaxes(2, 3), dvt.swapaxes(2, 3)

    def _blocks(self, q: Array, k: Array, causal: bool) -> Iterator[tuple[int, int, int]]:
        """First query, last query + 1, and how many keys are looked at."""
        queries, keys = q.shape[2], k.shape[2]
        for start in range(0, queries, self.size):
            stop = min(start + self.size, queries)
            yield start, stop, keys - (queries - stop) if causal else keys


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _folded(x: Array, k: Array) -> Array:
    """`[b, N, n, ...]` → `[b, K, N / K * n, ...]`, K from the keys."""
    return x.reshape(*k.shape[:2], -1, *x.shape[3:])


def _unfolded(x: Array, q: Array) -> Array:
    """`[b, K, N / K * n, ...]` → `[b, N, n, ...]`, N from the queries."""
    return x.reshape(*q.shape[:2], -1, *x.shape[3:])


def _mask(rows: Array, q: Array, seen: Array, causal: bool, start: int, keys: int) -> Array:
    """Which keys the rows of a block see, `[b, 1, 1 or rows, keys]`."""
    real = seen[:, None, None, :keys]
    if not causal:
        return real
    queries = rows.shape[2] * rows.shape[1] // q.shape[1]
    last = seen.shape[1] - q.shape[2] + start + jnp.arange(rows.shape[2]) % queries
    return real & (jnp.arange(keys) <= last[:, None])
