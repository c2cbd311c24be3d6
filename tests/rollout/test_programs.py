"""What the programs of a rollout change stays where it lies, and they read the trainer's own parameters if they can."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params
from maestro_jax.policy.attention.interface import suited_to
from maestro_jax.policy.model import DecodingPolicy, Policy
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import DecodeConfig, StopTables
from maestro_jax.rollout.moves import LaneStarts
from maestro_jax.rollout.programs import RolloutPrograms, Weights, decoding_weights, rollout_programs
from maestro_jax.rollout.state import RolloutSizes
from tests.rollout import toy

# Three of twelve lanes are moved at a time; caches are most of the memory.
SIZES = RolloutSizes(
    shards=1,
    lanes=12,
    groups=3,
    members=4,
    prefix=24,
    room=256,
    turn_budget=7,
    pages=6,
    append_rows=3,
    prefill_groups=3,
)
CONFIG = DecodeConfig(4, temperature=1.0)
TABLES = StopTables(*build_automaton([b"y"] * toy.VOCABULARY), np.int32(-1))  # nothing stops


def bytes_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---- memory ------------------------------------------------------------------------------------------------


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, Any, tuple]]:
    """By name: a program, what of its arguments it changes, and all of them."""
    graph, params = nnx.split(toy.policy(), nnx.Param)
    run, prompts = rollout_programs(graph, SIZES, CONFIG), toy.prompts()
    groups, lanes, pages = jax.eval_shape(run.open, params, prompts.root)
    moved = jax.eval_shape(run.unload, lanes, integers(1, 3))
    at, table, every_lane = integers(1, 3), integers(1, 3, SIZES.pages_of_lane), integers(1, 12)
    keys = jax.ShapeDtypeStruct((1, 12, 2), jnp.uint32)
    starts = LaneStarts(every_lane, every_lane, every_lane, every_lane, every_lane, keys)
    noise = jax.ShapeDtypeStruct((), jnp.float32)
    prefixes, weights = dataclasses.replace(groups.shared, root_keys=[], root_values=[]), Weights.of(params)
    return {
        "with_root": (run.with_root, (prefixes, groups.hidden), (params, groups, prompts.root)),
        "prefill": (run.prefill, groups, (params, groups, prompts, at)),
        "decode": (run.decode, lanes, (weights, groups, lanes, TABLES, noise)),
        "append": (run.append, lanes, (weights, groups, lanes, at, integers(1, 3, 5), at)),
        "assign": (run.assign, lanes, (groups, lanes, starts)),
        "park": (run.park, pages, (lanes, pages, at, table)),
        "load": (run.load, lanes, (lanes, pages, at, table)),
        "bring_back": (run.bring_back, lanes, (lanes, at, moved)),
    }


@pytest.mark.parametrize("name", ["with_root", "prefill", "decode", "append", "assign", "park", "load", "bring_back"])
def test_what_a_program_changes_stays_where_it_lies(name: str, calls: Mapping[str, tuple[Any, Any, tuple]]) -> None:
    program, changed, arguments = calls[name]
    memory = program.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of(changed)
    _, lanes, _ = calls["decode"]
    # Room for the moved rows, and for one program's own work; not for a second set of caches.
    if name not in ("with_root", "prefill", "append"):
        assert memory.temp_size_in_bytes < bytes_of(calls["decode"][1].cache) / 2


# ---- weights -----------------------------------------------------------------------------------------------


def leaves_of(params: nnx.State) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def buffers(x: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def test_on_one_device_decoding_reads_the_trainers_own_buffers() -> None:
    graph, params = nnx.split(toy.policy(), nnx.Param)
    found, wanted = leaves_of(decoding_weights(graph, params).whole()), leaves_of(params)
    assert found.keys() == wanted.keys()
    assert all(buffers(found[name]) == buffers(leaf) for name, leaf in wanted.items())


@pytest.fixture(scope="module")
def in_bfloat16() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(
        Policy(toy.architecture(), nnx.Rngs(0), jnp.float32, jnp.bfloat16, attention=suited_to("cpu")), nnx.Param
    )


def test_the_decoder_is_cut_and_cast_to_the_compute_dtype(in_bfloat16: tuple[nnx.GraphDef, nnx.State]) -> None:
    found = decoding_weights(*in_bfloat16).whole()
    assert isinstance(found, DecodingPolicy) and len(found.layers) == toy.architecture().text.num_hidden_layers
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


def decoded(run: RolloutPrograms, params: nnx.State, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of a chunk, greedily."""
    prompts, everyone = toy.prompts(), np.ones((1, 12), np.int32)
    groups, lanes, _ = run.open(params, prompts.root)
    groups = run.prefill(params, groups, prompts, np.arange(3)[None])
    nothing = np.zeros((1, 12), np.int32)
    member_slot, keys = np.arange(12)[None], np.zeros((1, 12, 2), np.uint32)
    lanes = run.assign(groups, lanes, LaneStarts(everyone, everyone, member_slot, nothing, nothing, keys))
    lanes = run.decode(weights, groups, lanes, TABLES, np.float32(0))
    return np.asarray(lanes.tokens), np.asarray(lanes.logprobs)


def test_weights_cast_once_decode_what_weights_cast_at_use_do(in_bfloat16: tuple[nnx.GraphDef, nnx.State]) -> None:
    graph, params = in_bfloat16
    run = rollout_programs(graph, SIZES, CONFIG)
    for found, wanted in zip(
        decoded(run, params, decoding_weights(graph, params)), decoded(run, params, Weights.of(params)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_on_a_mesh_the_decoder_is_whole_but_for_the_tensor_axis() -> None:
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices())
    graph, params = init_params(lambda: Policy(toy.architecture(), nnx.Rngs(0)), mesh, ShardingRules())
    with jax.set_mesh(mesh):
        found = decoding_weights(graph, params).whole()
    assert isinstance(found, DecodingPolicy)
    for leaf in jax.tree.leaves(found):
        assert "fsdp" not in jax.tree.leaves(tuple(leaf.sharding.spec))
    assert any("tensor" in leaf.sharding.spec for leaf in jax.tree.leaves(found.layers))
    np.testing.assert_array_equal(found.embedding, params["language_model"]["embed_tokens"]["embedding"][...])
