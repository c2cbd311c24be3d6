"""The same logits and gradients on eight devices as on one, however parameters and groups are spread."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maestro_jax.aot.hlo import collectives
from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import (
    ShardingRules,
    gather_over_fsdp,
    init_params,
    keep_over_groups,
    over_groups,
    replicated,
)
from maestro_jax.policy.attention.interface import AttentionConfig
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.layers import Embedding
from maestro_jax.policy.model import Policy, prompt_shardings
from tests.policy import reference
from tests.policy.reference import ROOT, assert_near

WHOLE, MIXED, EVERY_AXIS = (1, 8, 1), (1, 4, 2), (2, 2, 2)
B, G, P, R = 8, 2, 24, 4
BLOCKS, SPLASH = AttentionConfig("blocks"), AttentionConfig("splash_interpret")
TOLERANCE = 1e-5  # fp32: sums are split over devices; a missing collective is off by parts of one


def architecture() -> PolicyArchitecture:
    """Sizes that can be told apart in a program, also when they are split in two."""
    toy = reference.architecture()
    return dataclasses.replace(toy, text=dataclasses.replace(toy.text, intermediate_size=112))


def lowered(axes: tuple[int, int, int], attention: AttentionConfig = BLOCKS) -> tuple[Any, nnx.State]:
    """A program that gives gradients of the members' mean log-likelihood and logits `[B, G, R, V]`; its parameters."""
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    make = lambda: Policy(architecture(), nnx.Rngs(0), remat=True, attention=attention)  # noqa: E731
    graph, params = init_params(make, mesh, ShardingRules())
    rows = (reference.three_rows() * 3)[:B]
    # Splash attention takes rows of 128 tokens and patches; what is added is padding.
    width, patches = (128 - G * R, 128) if attention == SPLASH else (P, 24)
    prompts = jax.device_put(reference.collate(ROOT, rows, width, per_group=2, patches=patches), prompt_shardings(mesh))
    members = jax.device_put(reference.members(B, G, R), over_groups(mesh))

    def mean(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        policy = nnx.merge(graph, params)
        last, hidden = policy.encode_groups(prompts, members, jnp.full((B, G), R))
        first = jnp.broadcast_to(last[:, None, None], (B, G, 1, last.shape[-1]))
        logits = policy.logits(jnp.concatenate([first, hidden[:, :, :-1]], axis=2))
        return jnp.take_along_axis(jax.nn.log_softmax(logits), members[..., None], axis=-1).mean(), logits

    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(mean, has_aux=True)).lower(params), params


Run = tuple[float, np.ndarray, dict[str, np.ndarray]]


def run(axes: tuple[int, int, int], attention: AttentionConfig = BLOCKS) -> Run:
    """The mean, logits `[B, G, R, V]`, and gradients by name."""
    program, params = lowered(axes, attention)
    (value, logits), gradients = program.compile()(params)
    return float(value), np.asarray(logits), {n: np.asarray(leaf) for n, leaf in named_leaves(gradients).items()}


@pytest.fixture(scope="module")
def alone() -> Run:
    return run((1, 1, 1))


@pytest.mark.parametrize(
    ("axes", "attention"),
    [
        (EVERY_AXIS, BLOCKS),
        (WHOLE, SPLASH),
        pytest.param(EVERY_AXIS, SPLASH, marks=pytest.mark.slow),
        pytest.param(WHOLE, BLOCKS, marks=pytest.mark.slow),
        pytest.param(MIXED, BLOCKS, marks=pytest.mark.slow),
        pytest.param(MIXED, SPLASH, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else value.backend,
)
def test_a_mesh_computes_what_one_device_does(
    axes: tuple[int, int, int], attention: AttentionConfig, alone: Run
) -> None:
    value, logits, gradients = run(axes, attention)
    assert abs(value - alone[0]) <= 1e-6 * abs(alone[0])
    assert_near(logits, alone[1], TOLERANCE, "logits")
    for name, wanted in alone[2].items():
        assert np.abs(wanted).max() > 1e-6, f"{name} takes no part; the comparison would be empty"
        assert_near(gradients[name], wanted, TOLERANCE, name)


@pytest.mark.parametrize("axes", [EVERY_AXIS, *(pytest.param(axes, marks=pytest.mark.slow) for axes in (WHOLE, MIXED))])
def test_every_device_computes_its_own_groups_only(axes: tuple[int, int, int]) -> None:
    """Left alone, XLA keeps every group on every device and splits features instead."""
    text = lowered(axes)[0].compile().as_text()
    own, width = B // (axes[0] * axes[1]), architecture().text.intermediate_size // axes[2]
    tokens = P + G * R
    spelled = {groups: (f"f32[{groups},{tokens},{width}]", f"f32[{groups * tokens},{width}]") for groups in (own, B)}
    assert any(shape in text for shape in spelled[own])  # inside the MLP
    assert not any(shape in text for shape in spelled[B])


def test_weights_are_gathered_a_layer_at_a_time() -> None:
    """Never a whole stack. (Whether in bfloat16 only a TPU program can tell: XLA computes it in fp32 on CPUs.)"""
    mesh = make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])
    kernel = jax.ShapeDtypeStruct((3, 64, 112), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 16, 64), jnp.bfloat16, sharding=over_groups(mesh))

    def value(kernel: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            whole = gather_over_fsdp(kernel.astype(x.dtype), ("embed", "mlp"))
            return jnp.sin(x @ whole) @ whole.T, None

        return jnp.sum(jax.lax.scan(layer, x, kernel)[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(value), out_shardings=kernel.sharding).lower(kernel, x).compile().as_text()
    gathered = [c for c in collectives(text) if c.kind == "all-gather"]
    assert gathered and all(c.times % 3 == 0 for c in gathered)  # inside the loop
    assert {shape for c in gathered for shape in c.shapes} <= {("bf16", (64, 112)), ("f32", (64, 112))}


def test_the_gradient_of_a_table_is_an_exact_sum_that_no_device_holds_whole() -> None:
    """In bf16 a sum of ones stops growing at 256; a dense fp32 table would be 1.6 GB of the 4B on every device."""
    mesh, tokens = make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8]), 300
    graph, table = nnx.split(Embedding(40, 16, ("vocab", "embed"), jnp.float32, nnx.Rngs(0)))
    shards, groups = NamedSharding(mesh, PartitionSpec("tensor", "fsdp")), over_groups(mesh)

    def value(table: nnx.State, root: jax.Array, ids: jax.Array) -> jax.Array:
        found = nnx.merge(graph, table).lookups((root, ids), jnp.bfloat16)
        return sum(jnp.sum(keep_over_groups(x).astype(jnp.float32)) for x in found)

    program = jax.jit(jax.grad(value), in_shardings=(shards, replicated(mesh), groups), out_shardings=shards)
    given = table, jnp.full((1, 5), 3), jnp.full((8, tokens), 7)
    with jax.set_mesh(mesh):
        text = program.lower(*given).compile().as_text()
        found = np.asarray(jax.tree.leaves(program(*given))[0])
    wanted = np.zeros((40, 16))
    wanted[3], wanted[7] = 5, 8 * tokens
    np.testing.assert_array_equal(found, wanted)
    assert "f32[40,2]" in text  # a device's columns
    assert "[40,16]" not in text
