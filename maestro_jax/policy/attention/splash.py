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
    """A mask that is computed tile by tile. Equal masks have equal fields: heads share one.

    In front of a row's own keys stand `before` ones that every query sees, and then none up to key number `filled`, so
    that large tiles divide all keys.
    """

    before: int
    block: int  # upper bound of a tile's sides

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(size)[cut] for cut, size in zip(index, self.shape, strict=True))
        return self.visible(rows[:, None], columns[None, :])

    def visible(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Queries, and keys of their own."""
        raise NotImplementedError

    @property
    def filled(self) -> int:
        """The largest tile is taken that needs at most an eighth more keys than whole lanes do."""
        least = -(-(self.before + self.length) // _LANES) * _LANES
        tile = max(size for size in _sides(self.block) if -least % size <= least // 8)
        return least + -least % tile - self.length

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        return self.length, self.filled + self.length


@dataclasses.dataclass(frozen=True)
class GroupMask(_Mask):
    """Rows of a `GroupLayout` behind `before` tokens that everybody sees."""

    layout: GroupLayout
    before: int
    block: int

    @property
    def length(self) -> int:
        return self.layout.length

    def visible(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return (key < self.before) | (key >= self.filled) & self.layout.sees(query, key - self.filled)


@dataclasses.dataclass(frozen=True)
class WholeMask(_Mask):
    """Everybody sees everybody."""

    tokens: int
    block: int
    before: int = 0

    @property
    def length(self) -> int:
        return self.tokens

    def visible(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.broadcast_to(key >= self.filled, np.broadcast_shapes(query.shape, key.shape))


def splash(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    mask: GroupMask | WholeMask,
    interpret: bool,
) -> Array:
    """Attention under `mask` and `real`, on every device for its own rows and heads.

    Args:
      q: `[B, T, N, H]`, scaled.
      k, v: `[B, before + T, K, H]`.
      real: bool `[B, T]`.
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
    run = functools.partial(_local, mask=mask, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # XLA cannot split a kernel: every device is told to run it on its own part
        batch = None if q.shape[0] % batch_shards(mesh) else BATCH_AXES
        heads, row = PartitionSpec(batch, "tensor"), PartitionSpec(batch)
        run = jax.shard_map(run, in_specs=(heads, heads, heads, row, row), out_specs=heads, check_vma=False)
    return run(q, k, v, ids, ids_of_keys).swapaxes(1, 2)


def _local(q: Array, k: Array, v: Array, ids: Array, ids_of_keys: Array, mask: _Mask, interpret: bool) -> Array:
    """The kernel over rows `[b, n, T, H]`, `[b, k, S, H]` of one device."""
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=tiles(mask),
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(ids, ids_of_keys)
    return jax.vmap(kernel)(q, k, v, segments)


def _sides(block: int) -> range:
    """Possible sides of a tile."""
    return range(_LANES, max(block, _LANES) + 1, _LANES)


def tiles(mask: _Mask) -> splash_attention_kernel.BlockSizes:
    """The largest tiles that divide the numbers of queries and of keys.

    Keys' and queries' gradients have a kernel each. The fused one would keep the gradients of all queries once for each
    tile of keys, rounded, and sum them afterwards.
    """
    row, column = (max(size for size in _sides(mask.block) if length % size == 0) for length in mask.shape)
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
