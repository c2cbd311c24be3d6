"""Fingerprints tell any change of bits, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maestro_jax.checkpoint import fingerprint
from maestro_jax.checkpoint.fingerprint import combined, fingerprint_of, fingerprints, read_through
from maestro_jax.parallel.mesh import MeshConfig, make_mesh

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")
# Few, since each is compiled for each dtype.
SHAPES = ((), (7,), (3, 5), (2, 3, 4))


def some_array(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits, among them not-a-numbers and numbers below the normal ones."""
    rng, kind = np.random.default_rng(seed), jnp.dtype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)


def mix(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def reference(array: np.ndarray) -> str:
    """The definition, element by element."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
    index = np.zeros(array.shape, np.uint32)
    for axis, places in enumerate(np.indices(array.shape).astype(np.uint32)):
        del axis
        index = index * np.uint32(0x9E3779B1) + places
    first = mix(bits ^ mix(index.reshape(-1)))
    second = mix(first + np.uint32(0x9E3779B1))
    return "".join(f"{int(part.astype(np.uint64).sum()) % 2**32:08x}" for part in (first, second))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_its_definition_says(dtype: str, shape: tuple[int, ...]) -> None:
    array = some_array(dtype, shape, seed=1)
    assert fingerprint_of(array) == reference(array)


def test_rows_at_a_time_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 3 * 4 * 4)  # three rows of seven
    array = some_array("float32", (7, 4), seed=5)
    assert fingerprint_of(array) == reference(array)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 2**32), st.data())
def test_any_one_bit_counts(dtype: str, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    array = some_array(dtype, shape, seed)
    raw = bytearray(array.tobytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1)) & (-8 if dtype == "bool" else -1)  # a bool has one bit
    raw[bit // 8] ^= 1 << bit % 8
    flipped = np.frombuffer(bytes(raw), array.dtype).reshape(shape)
    assert fingerprint_of(flipped) != fingerprint_of(array)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(DTYPES[:-1]), st.sampled_from(SHAPES[1:]), st.integers(0, 2**32), st.data())
def test_two_elements_swapped_count(dtype: str, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    array = np.ravel(some_array(dtype, shape, seed)).copy()
    one, other = data.draw(st.lists(st.integers(0, array.size - 1), min_size=2, max_size=2, unique=True))
    swapped = array.copy()
    swapped[[one, other]] = array[[other, one]]
    same = swapped.tobytes() == array.tobytes()
    assert (fingerprint_of(swapped.reshape(shape)) == fingerprint_of(array.reshape(shape))) == same


def on_mesh(array: np.ndarray, mesh: Mesh, spec: PartitionSpec, memory: str | None = None) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, spec, memory_kind=memory))


def test_it_depends_on_no_mesh_no_sharding_and_no_memory() -> None:
    arrays = {dtype: some_array(dtype, (8, 16), seed=3) for dtype in DTYPES}
    expected = {name: reference(array) for name, array in arrays.items()}
    for axes in ((2, 2, 2), (1, 4, 1), (1, 1, 1)):
        mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
        for spec in (PartitionSpec(), PartitionSpec("fsdp", "tensor"), PartitionSpec(None, ("data", "fsdp", "tensor"))):
            placed = {name: on_mesh(array, mesh, spec) for name, array in arrays.items()}
            placed["float32"] = on_mesh(arrays["float32"], mesh, spec, "pinned_host")
            assert fingerprints(placed) == expected
            assert not placed["float32"].is_deleted() and placed["float32"].sharding.memory_kind == "pinned_host"


def test_numbers_that_are_not_finite_are_counted_once_on_any_mesh() -> None:
    array = np.zeros((8, 16), np.float32)
    array[0, 0], array[3, 5], array[7, 15] = np.nan, np.inf, -np.inf
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    for spec in (PartitionSpec(), PartitionSpec("fsdp", "tensor")):
        placed = {"a": on_mesh(array, mesh, spec), "b": on_mesh(np.full((8, 16), 127, np.int8), mesh, spec)}
        found = read_through(placed)
        assert {name: count for name, (_, count) in found.items()} == {"a": 3, "b": 0}
        assert found["a"][0] == fingerprint_of(array)


def test_keys_of_random_numbers_have_one() -> None:
    keys = {str(seed): jax.random.key(seed) for seed in range(3)}
    assert len(set(fingerprints(keys).values())) == 3


def test_names_and_their_arrays_count_together() -> None:
    found = fingerprints({"a": jnp.ones(3), "b": jnp.zeros(3)})
    swapped = {"a": found["b"], "b": found["a"]}
    assert combined(found) == combined(dict(reversed(found.items())))
    assert len({combined(found), combined(swapped), combined({"a": found["a"]})}) == 3
