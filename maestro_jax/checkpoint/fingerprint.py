"""Fingerprints of arrays, computed where the arrays are: equal bits give equal fingerprints on any mesh.

An array is taken as words of 32 bits (narrower elements are widened, wider ones are split). Each word is mixed with its
global index by a bijection, and the results are summed modulo 2 ** 32: a sum does not depend on how the array is cut
over devices, and a changed word changes it for certain. That two elements were swapped, or that several words changed,
goes unnoticed by chance only: two sums of different mixtures make 64 bits.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maestro_jax.parallel.sharding import HOST_MEMORY, replicated

Array = jax.Array

# 2 ** 32 over the golden ratio: multiples of it modulo 2 ** 32 keep far from each other, so that index pairs differ.
_GOLDEN = 0x9E3779B1


def fingerprints(leaves: Mapping[str, Array]) -> dict[str, str]:
    """Name → 16 hexadecimal digits, the same on every process.

    One pass on the devices, without copies. Arrays in the host's memory are brought to the devices one at a time.
    """
    on_host = {name for name, leaf in leaves.items() if leaf.sharding.memory_kind == HOST_MEMORY}
    on_device = [name for name in leaves if name not in on_host]
    rows = dict(zip(on_device, _fetch([leaves[name] for name in on_device]), strict=True))
    for name in on_host:
        leaf = leaves[name]
        moved = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
        (rows[name],) = _fetch([moved])
        moved.delete()
    return {name: f"{rows[name][0]:08x}{rows[name][1]:08x}" for name in leaves}


def fingerprint_of(array: np.ndarray) -> str:
    """The fingerprint of an array of this process, computed on its CPU."""
    (found,) = fingerprints({"": jax.device_put(array, jax.local_devices(backend="cpu")[0])}).values()
    return found


def combined(each: Mapping[str, str]) -> str:
    """One fingerprint of named ones."""
    lines = "".join(f"{name} {each[name]}\n" for name in sorted(each))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def _fetch(leaves: Sequence[Array]) -> list[tuple[int, int]]:
    if not leaves:
        return []
    meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    sums = _program(meshes[0] if meshes else None)(leaves)
    return [(int(first), int(second)) for first, second in np.asarray(sums)]


@functools.cache
def _program(mesh: Mesh | None) -> "jax.stages.Wrapped":
    """Arrays on `mesh` (None: on one device) → uint32 `[arrays, 2]`, whole on every device."""
    return jax.jit(
        lambda leaves: jnp.stack([_sums(leaf) for leaf in leaves]),
        out_shardings=None if mesh is None else replicated(mesh),
    )


def _sums(leaf: Array) -> Array:
    """uint32 `[2]`."""
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = index * jnp.uint32(_GOLDEN) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    first = _mix(words ^ _mix(index))
    second = _mix(first + jnp.uint32(_GOLDEN))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


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
