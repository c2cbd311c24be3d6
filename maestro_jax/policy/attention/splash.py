"""Splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) under a static mask of ours.

The kernel walks over tiles of scores and leaves out those in which nobody sees anybody; scores never reach
memory. The mask is known when the program is compiled: which token stands where in a row. Which tokens are
padding is not; segment ids say that: tokens see those of their own segment only, real ones 1, padding 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import BATCH_AXES, batch_shards
from maestro_jax.policy.attention.groups import GroupLayout

Array = jax.Array

_LANES = 128  # the kernel's tiles have sides of multiples of it


class _Mask(splash_attention_mask.Mask):
    """A mask that is computed tile by tile. Equal masks have equal fields: heads share one."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(size)[cut] for cut, size in zip(index, self.shape, strict=True))
        return self.visible(rows[:, None], columns[None, :])

    def visible(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GroupMask(_Mask):
    """Rows of a `GroupLayout` behind `before` tokens that everybody sees."""

    layout: GroupLayout
    before: int

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys; the tokens before are filled up to whole lanes."""
        return self.layout.length, self.filled + self.layout.length

    @property
    def filled(self) -> int:
        return -self.before % _LANES + self.before

    def visible(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return (key < self.before) | (key >= self.filled) & self.layout.sees(query, key - self.filled)


@dataclasses.dataclass(frozen=True)
class WholeMask(_Mask):
    """Everybody sees everybody."""

    length: int
    before: int = 0
    filled: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def visible(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.ones(np.broadcast_shapes(query.shape, key.shape), bool)


def splash(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    mask: GroupMask | WholeMask,
    block: int,
    interpret: bool,
) -> Array:
    """Attention under `mask` and `real`, on every device for its own rows and heads.

    Args:
      q: `[B, T, N, H]`, scaled.
      k, v: `[B, before + T, K, H]`.
      real: bool `[B, T]`.
      block: upper bound of a tile's sides.
      interpret: whether to run the kernel's steps as ordinary operations, on any device.

    Returns:
      `[B, T, N, H]` in the dtype of the queries.

    Raises:
      ConfigError: T is not a multiple of 128.
    """
    if q.shape[1] % _LANES:
        raise ConfigError(
            f"splash attention needs rows of a multiple of {_LANES} tokens, found {q.shape[1]}; choose "
            "config.policy.prefix_buckets, image_buckets and config.rollout.member_buckets so, "
            'or set config.policy.attention="blocks"'
        )
    gap = mask.filled - mask.before
    k, v = (jnp.concatenate([x[:, : mask.before], _zeros(x, gap), x[:, mask.before :]], axis=1) for x in (k, v))
    ids = real.astype(jnp.int32)
    ids_of_keys = jnp.pad(ids, ((0, 0), (mask.filled, 0)), constant_values=1)
    q, k, v = ((x.swapaxes(1, 2)) for x in (q, k, v))
    run = functools.partial(_local, mask=mask, block=block, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # XLA cannot split a kernel: every device is told to run it on its own part
        batch = None if q.shape[0] % batch_shards(mesh) else BATCH_AXES
        heads, row = PartitionSpec(batch, "tensor"), PartitionSpec(batch)
        run = jax.shard_map(run, in_specs=(heads, heads, heads, row, row), out_specs=heads, check_vma=False)
    return run(q, k, v, ids, ids_of_keys).swapaxes(1, 2)


def _local(
    q: Array, k: Array, v: Array, ids: Array, ids_of_keys: Array, mask: _Mask, block: int, interpret: bool
) -> Array:
    """The kernel over rows `[b, n, T, H]`, `[b, k, S, H]` of one device."""
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=_tiles(mask.shape, block),
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(ids, ids_of_keys)
    return jax.vmap(kernel)(q, k, v, segments)


def _tiles(shape: tuple[int, ...], block: int) -> splash_attention_kernel.BlockSizes:
    """The largest tiles that divide the numbers of queries and of keys."""
    row, column = (
        max(size for size in range(_LANES, max(block, _LANES) + 1, _LANES) if length % size == 0) for length in shape
    )
    return splash_attention_kernel.BlockSizes(
        block_q=row,
        block_kv=column,
        block_q_dkv=row,
        block_kv_dkv=column,
        block_q_dq=row,
        block_kv_dq=column,
    )


def _zeros(like: Array, length: int) -> Array:
    return jnp.zeros((like.shape[0], length, *like.shape[2:]), like.dtype)
