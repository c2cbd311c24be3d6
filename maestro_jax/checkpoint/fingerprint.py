"""Fingerprints of arrays, computed where the arrays are: equal bits give equal fingerprints on any mesh.

An array is taken as words of 32 bits (narrower elements are widened, wider ones are split). Each word is mixed with its
global index by a bijection, and the results are summed modulo 2 ** 32: a sum does not depend on how the array is cut
over devices, and a changed word changes it for certain. That two elements were swapped, or that several words changed,
goes unnoticed by chance only: two sums of different mixtures make 64 bits.

Each device sums its own shard; the host adds up. So no program has a collective, and there is one program for all
arrays of a shape and sharding: a parameter and its two moments share it. The same pass counts numbers that are not
finite.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from maestro_jax.parallel.sharding import HOST_MEMORY

Array = jax.Array

# 2 ** 32 over the golden ratio: multiples of it modulo 2 ** 32 keep far from each other, so that index pairs differ.
_GOLDEN = 0x9E3779B1
PIECE_BYTES = 2**28  # of an array in this process's memory that are copied at a time


def fingerprints(leaves: Mapping[str, Array]) -> dict[str, str]:
    """Name → 16 hexadecimal digits, the same on every process."""
    return {name: fingerprint for name, (fingerprint, _) in read_through(leaves).items()}


def read_through(leaves: Mapping[str, Array]) -> dict[str, tuple[str, int]]:
    """Name → fingerprint, and how many elements are not finite; the same on every process.

    One pass on the devices, without copies. Arrays in the host's memory are brought to the devices one at a time.
    """
    sums = _added_up([_sums_of(leaf) for leaf in leaves.values()])
    elsewhere = [not leaf.is_fully_addressable for leaf in leaves.values()]
    if any(elsewhere):
        everywhere = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
        sums = np.where(np.array(elsewhere)[:, None], everywhere, sums)
    return {name: (_spelled(*pair), count) for name, (*pair, count) in zip(leaves, sums.tolist(), strict=True)}


def fingerprint_of(array: np.ndarray) -> str:
    """The fingerprint of an array of this process, computed on its CPU, where rows are copied to, some at a time."""
    cpu, array = jax.local_devices(backend="cpu")[0], np.atleast_1d(array)
    each = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
    total = np.zeros(3, np.uint32)
    for start in range(0, len(array), each):
        total += np.asarray(_sums_of_rows(jax.device_put(array[start : start + each], cpu), start))
    return _spelled(*total[:2].tolist())


def combined(each: Mapping[str, str]) -> str:
    """One fingerprint of named ones."""
    lines = "".join(f"{name} {each[name]}\n" for name in sorted(each))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def _spelled(first: int, second: int) -> str:
    return f"{first:08x}{second:08x}"


@jax.jit
def _sums_of_rows(rows: Array, start: int) -> Array:
    return _sums(rows, (start, *[0] * (rows.ndim - 1)))


def _sums_of(leaf: Array) -> Array:
    """uint32 `[devices, 3]`, what the shard of each device adds to the sums."""
    if leaf.sharding.memory_kind != HOST_MEMORY:
        return _program(leaf.sharding)(leaf)
    moved = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
    sums = jax.block_until_ready(_program(moved.sharding)(moved))
    moved.delete()
    return sums


def _added_up(sums: Sequence[Array]) -> np.ndarray:
    """uint32 `[arrays, 3]`: over the devices of this process."""
    for each in sums:
        each.copy_to_host_async()
    shards = [[np.asarray(shard.data) for shard in each.addressable_shards] for each in sums]
    return np.array([np.concatenate(each).sum(axis=0, dtype=np.uint32) for each in shards], np.uint32).reshape(-1, 3)


@functools.cache
def _program(sharding: Sharding) -> "jax.stages.Wrapped":
    """Compiles `_sums_of` for arrays in these shards."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(lambda leaf: _sums(leaf, (0,) * leaf.ndim)[None])
    mesh = sharding.mesh

    def of_shard(shard: Array) -> Array:
        parts = [_axes(part) for part in (*sharding.spec, *[None] * (shard.ndim - len(sharding.spec)))]
        starts = [_place(axes, mesh.shape) * size for axes, size in zip(parts, shard.shape, strict=True)]
        copies = [name for name in mesh.axis_names if not any(name in axes for axes in parts)]
        # Of several devices with the same shard, one counts.
        return jnp.where(_place(copies, mesh.shape) == 0, _sums(shard, starts), jnp.uint32(0))[None]

    everywhere = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=sharding.spec, out_specs=everywhere, check_vma=False))


def _axes(part: str | Sequence[str] | None) -> Sequence[str]:
    return (part,) if isinstance(part, str) else part or ()


def _place(axes: Sequence[str], sizes: Mapping[str, int]) -> Array:
    """uint32 []: where this device stands along mesh axes taken together."""
    place = jnp.uint32(0)
    for axis in axes:
        place = place * jnp.uint32(sizes[axis]) + jax.lax.axis_index(axis).astype(jnp.uint32)
    return place


def _sums(shard: Array, starts: Sequence[Array | int]) -> Array:
    """uint32 `[3]`: two of the fingerprint, a count; `starts`: index of the shard's first element along each axis."""
    words = _words(shard)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, start in enumerate((*starts, *[0] * (words.ndim - len(starts)))):
        own = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + jnp.uint32(start)
        index = index * jnp.uint32(_GOLDEN) + own
    first = _mix(words ^ _mix(index))
    second = _mix(first + jnp.uint32(_GOLDEN))
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(
        (first, second), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), tuple(range(words.ndim))
    )
    spoiled = zero
    if jnp.issubdtype(shard.dtype, jnp.floating):
        spoiled = jnp.sum(~jnp.isfinite(shard), dtype=jnp.uint32)
    return jnp.stack([*sums, spoiled])


def _words(leaf: Array) -> Array:
    """The bits of an array as uint32 `[...]`, of wider types as `[..., words]`."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(leaf.dtype)
    return jax.lax.bitcast_convert_type(leaf, f"uint{min(bits, 32)}").astype(jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of uint32 in which every bit of the result depends on every bit of `x` (MurmurHash3's fmix32)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
