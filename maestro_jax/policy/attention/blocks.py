"""Attention of whole sequences in blocks of queries, in plain JAX, with its own backward pass.

A block's softmax runs over all keys that it may see at once: the group's root and prefix, and for members their own
tokens. The backward pass gets the one log-sum-exp of both parts, and computes the scores again (Dao et al. 2022,
arXiv 2205.14135), so no more than a block of them exists. All products are written as plain [m, k] x [k, n], because a
compiler that has to turn a block of scores round pays more for it than for the product (seen with XLA on CPUs).

Rows of queries are `tokens x heads of one KV head`: all that share keys are rows of one matrix.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maestro_jax.policy.attention.groups import GroupLayout

Array = jax.Array

_MASKED = -1e30  # finite: a row of padding must not give NaN


@dataclasses.dataclass(frozen=True)
class Block:
    """Queries of a group and what they see; all static.

    Attributes:
      start, stop: tokens of the row.
      members: how many whole members they are; 0 if they are of the prefix.
      shared: keys in front, of root and prefix, that are looked at.
    """

    start: int
    stop: int
    members: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tokens see which, and in which blocks.

    Attributes:
      before: P0, keys in front of the row that everybody sees.
      whole: everybody sees everybody (an image), rather than what `layout` says.
      heads: of queries for each of keys.
      block: most tokens of a block, or one member.
    """

    layout: GroupLayout
    before: int
    whole: bool
    heads: int
    block: int

    @property
    def blocks(self) -> list[Block]:
        prefix, room = self.layout.prefix, self.layout.room
        cuts = range(0, prefix, self.block)
        stops = [min(start + self.block, prefix) for start in cuts]
        seen = [self.before + (prefix if self.whole else stop) for stop in stops]
        blocks = [Block(*each) for each in zip(cuts, stops, [0] * len(stops), seen, strict=True)]
        count = max(self.block // max(room, 1), 1)
        for first in range(0, self.layout.members, count):
            last = min(first + count, self.layout.members)
            ends = (prefix + first * room, prefix + last * room)
            blocks.append(Block(*ends, last - first, self.before + prefix))
        return blocks


def attend_in_blocks(q: Array, k: Array, v: Array, real: Array, scale: float, plan: Plan) -> Array:
    """Attention of rows.

    Args:
      q: `[B, T, N, H]`.
      k, v: `[B, before + T, K, H]`.
      real: bool `[B, T]`.

    Returns:
      `[B, T, N, H]` in the dtype of the queries; softmax and sums over blocks in fp32.
    """
    b, t, n, h = q.shape
    kv = k.shape[2]
    rows = (q * scale).reshape(b, t, kv, n // kv, h).swapaxes(1, 2).reshape(b, kv, t * (n // kv), h)
    seen = jnp.pad(real, ((0, 0), (plan.before, 0)), constant_values=True)
    out = _attend(rows, k.swapaxes(1, 2), v.swapaxes(1, 2), seen, plan)
    return out.reshape(b, kv, t, n // kv, h).swapaxes(1, 2).reshape(b, t, n, h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, seen: Array, plan: Plan) -> Array:
    """`q [B, K, T * heads, H]`, `k, v [B, K, S, H]`, `seen [B, S]` → like q."""
    return _forward(q, k, v, seen, plan)[0]


def _forward(q: Array, k: Array, v: Array, seen: Array, plan: Plan) -> tuple[Array, tuple[Array, ...]]:
    kt = k.swapaxes(2, 3)
    outs, sums = [], []
    for block in plan.blocks:
        rows = q[:, :, block.start * plan.heads : block.stop * plan.heads]
        scores = _masked(_product(rows, kt[..., : block.shared]), _shared_mask(seen, plan, block))
        peak = jnp.max(scores, axis=-1)
        if block.members:
            own_scores = _masked(_product(_own(rows, block), _own_keys(kt, plan, block)), _own_mask(seen, plan, block))
            peak = jnp.maximum(peak, jnp.max(own_scores, axis=-1).reshape(peak.shape))
        weights = jnp.exp(scores - peak[..., None])
        total = jnp.sum(weights, axis=-1)
        out = _product(weights.astype(v.dtype), v[:, :, : block.shared])
        if block.members:
            weights = jnp.exp(own_scores - _own(peak, block)[..., None])
            total = total + jnp.sum(weights, axis=-1).reshape(total.shape)
            values = _own(v[:, :, plan.before + block.start : plan.before + block.stop], block)
            out = out + _product(weights.astype(v.dtype), values).reshape(out.shape)
        outs.append((out / total[..., None]).astype(q.dtype))
        sums.append(peak + jnp.log(total))
    out, lse = jnp.concatenate(outs, axis=2), jnp.concatenate(sums, axis=2)
    return out, (q, k, v, seen, out, lse)


def _backward(plan: Plan, residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, seen, out, lse = residuals
    kt, vt = k.swapaxes(2, 3), v.swapaxes(2, 3)
    # What the softmax takes off the gradients of all weights of a row.
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dkt, dvt = jnp.zeros(kt.shape, jnp.float32), jnp.zeros(vt.shape, jnp.float32)
    dqs = []
    for block in plan.blocks:
        cut = slice(block.start * plan.heads, block.stop * plan.heads)
        rows: tuple[Array, ...] = (q[:, :, cut], gradient[:, :, cut], lse[:, :, cut], delta[:, :, cut])
        shared = slice(0, block.shared)
        keys: tuple[Array, ...] = (kt[..., shared], vt[..., shared], k[:, :, shared])
        dq, dk, dv = _part_backward(rows, keys, _shared_mask(seen, plan, block))
        dkt, dvt = dkt.at[..., shared].add(dk), dvt.at[..., shared].add(dv)
        if block.members:
            own = slice(plan.before + block.start, plan.before + block.stop)
            rows = tuple(_own(x, block) for x in rows)
            keys = (_own_keys(kt, plan, block), _own_keys(vt, plan, block), _own(k[:, :, own], block))
            more, dk, dv = _part_backward(rows, keys, _own_mask(seen, plan, block))
            dq = dq + more.reshape(dq.shape)
            dkt, dvt = (x.at[..., own].add(_from_own(y, block)) for x, y in ((dkt, dk), (dvt, dv)))
        dqs.append(dq.astype(q.dtype))
    dk, dv = dkt.swapaxes(2, 3).astype(k.dtype), dvt.swapaxes(2, 3).astype(v.dtype)
    return jnp.concatenate(dqs, axis=2), dk, dv, None


_attend.defvjp(_forward, _backward)


def _part_backward(rows: tuple[Array, ...], keys: tuple[Array, ...], mask: Array) -> tuple[Array, Array, Array]:
    """Gradients from one part of the softmax: of rows `[..., rows, H]`, of keys and values `[..., H, keys]`; in fp32.

    Args:
      rows: queries, gradients of outputs, log-sum-exps and deltas.
      keys: keys turned, values turned, keys.
    """
    q, gradient, lse, delta = rows
    kt, vt, k = keys
    weights = jnp.exp(_masked(_product(q, kt), mask) - lse[..., None])
    ds = (weights * (_product(gradient, vt) - delta[..., None])).astype(q.dtype)
    dk = _product(q.swapaxes(-1, -2), ds)
    dv = _product(gradient.swapaxes(-1, -2), weights.astype(q.dtype))
    return _product(ds, k), dk, dv


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _masked(scores: Array, mask: Array) -> Array:
    return jnp.where(mask, scores, _MASKED)


def _shared_mask(seen: Array, plan: Plan, block: Block) -> Array:
    """Which keys in front the rows of a block see, `[B, 1, 1 or rows, shared]`."""
    real = seen[:, None, None, : block.shared]
    if block.members or plan.whole:
        return real
    token = plan.before + block.start + jnp.arange((block.stop - block.start) * plan.heads)[:, None] // plan.heads
    key = jnp.arange(block.shared)[None, :]
    return (key < token) & real | (key == token)  # padding sees itself, for want of others


def _own_mask(seen: Array, plan: Plan, block: Block) -> Array:
    """Which tokens of its own each row of a member sees, `[B, 1, M, rows, R]`."""
    room = plan.layout.room
    real = seen[:, plan.before + block.start : plan.before + block.stop].reshape(-1, 1, block.members, 1, room)
    token, key = jnp.arange(room)[:, None], jnp.arange(room)[None, :]
    mask = (key < token) & real | (key == token)
    return jnp.repeat(mask, plan.heads, axis=-2)


def _own(x: Array, block: Block) -> Array:
    """`[B, K, M * rows, ...]` → `[B, K, M, rows, ...]`."""
    return x.reshape(*x.shape[:2], block.members, -1, *x.shape[3:])


def _own_keys(turned: Array, plan: Plan, block: Block) -> Array:
    """Keys or values of a block's members `[B, K, M, H, R]`, of all `[B, K, H, S]`."""
    cut = turned[..., plan.before + block.start : plan.before + block.stop]
    return cut.reshape(*cut.shape[:3], block.members, plan.layout.room).swapaxes(2, 3)


def _from_own(turned: Array, block: Block) -> Array:
    """`[B, K, M, H, R]` → `[B, K, H, M * R]`."""
    return turned.swapaxes(2, 3).reshape(*turned.shape[:2], turned.shape[3], -1)
