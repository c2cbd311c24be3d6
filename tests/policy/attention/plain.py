"""Attention written down plainly: all keys of a row copied to every head, one softmax over all, JAX's gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from maestro_jax.policy.attention.groups import GroupLayout

Array = jax.Array


def attend_groups(
    q: Array, k: Array, v: Array, root: tuple[Array, Array] | None, real: Array, layout: GroupLayout
) -> Array:
    """What the function of this name in `interface.py` gives for real tokens."""
    before = 0 if root is None else root[0].shape[0]
    at = np.arange(layout.length)
    sees = np.concatenate([np.ones((layout.length, before), bool), layout.sees(at[:, None], at[None, :])], axis=1)
    real = jnp.concatenate([jnp.ones((len(real), before), bool), real], axis=1)
    if root is not None:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(x, (len(y), *x.shape)), y], axis=1)
            for x, y in zip(root, (k, v), strict=True)
        )
    return attend(q, k, v, real[:, None] & sees)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """`q [B, T, N, H]`, `k, v [B, S, K, H]`, `mask [B, T, S]` → `[B, T, N, H]`; finite for who sees nothing."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(mask[:, None], jnp.einsum("btnh,bsnh->bnts", q, k), -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
