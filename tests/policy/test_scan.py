"""Layers as a scan: one is compiled whatever the depth, and recomputing them saves memory and changes nothing."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.policy.layers import Linear, RMSNorm
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.text import Context
from tests.policy import reference
from tests.policy.reference import ROOT, assert_near

G, R = 2, 6


def deeper(layers: int, depth: int) -> reference.Config:
    config = copy.deepcopy(reference.CONFIG)
    config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"] = layers, depth
    return config


def gradient_program(config: reference.Config, remat: bool) -> tuple[Any, nnx.State]:
    """The gradient of some function of all hidden states, lowered, and parameters for it."""
    policy = Policy(reference.architecture(config), nnx.Rngs(0), remat=remat)
    graph, state = nnx.split(policy, nnx.Param)
    batch = reference.collate(ROOT, reference.three_rows(), width=24, per_group=2, patches=24)
    members, length = jnp.asarray(reference.members(3, G, R)), jnp.full((3, G), R)

    def value(state: nnx.State) -> jax.Array:
        last, hidden = nnx.merge(graph, state).encode_groups(batch, members, length)
        return jnp.mean(jnp.sin(hidden)) + jnp.mean(last**2)

    return jax.jit(jax.grad(value)).lower(state), state


def operations(layers: int, depth: int) -> int:
    return gradient_program(deeper(layers, depth), remat=True)[0].as_text().count("\n")


def test_the_program_does_not_grow_with_the_depth() -> None:
    shallow = operations(6, 6)
    assert operations(12, 6) == shallow and operations(6, 12) == shallow


@pytest.fixture(scope="module")
def programs() -> dict[bool, tuple[Any, nnx.State]]:
    made = {remat: gradient_program(deeper(10, 8), remat) for remat in (False, True)}
    return {remat: (program.compile(), state) for remat, (program, state) in made.items()}


def test_recomputing_layers_changes_no_gradient(programs: dict[bool, tuple[Any, nnx.State]]) -> None:
    kept, again = (program(state) for program, state in programs.values())
    for (path, found), wanted in zip(jax.tree_util.tree_leaves_with_path(again), jax.tree.leaves(kept), strict=True):
        # The same products in the same order; what is fused with what may differ.
        assert_near(found, wanted, 1e-5, jax.tree_util.keystr(path))


def test_recomputing_layers_keeps_less(programs: dict[bool, tuple[Any, nnx.State]]) -> None:
    kept, again = (program.memory_analysis().temp_size_in_bytes for program, _ in programs.values())
    assert again < 0.6 * kept


@nnx.jit
def encode(policy: Policy, batch: PrefixBatch) -> tuple[Context, jax.Array]:
    return policy.encode_prompts(batch, policy.encode_root(batch.root))


def test_bfloat16_stays_near_float32() -> None:
    """bf16 keeps 8 bits: 0.4 % a rounding, some tens of roundings deep; norms, softmax and logits are fp32."""
    batch = reference.collate(ROOT, reference.three_rows(), width=24, per_group=2, patches=24)
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        policy = Policy(reference.architecture(), nnx.Rngs(0), jnp.float32, dtype)
        _, last = encode(policy, batch)
        assert last.dtype == dtype
        logits = policy.logits(last)
        assert logits.dtype == jnp.float32
        found[dtype] = np.asarray(logits)
    wanted, rough = found[jnp.float32], found[jnp.bfloat16]
    assert 1e-4 < np.abs(rough - wanted).max() / np.abs(wanted).max() < 3e-2


def test_gradients_of_biases_and_scales_are_summed_in_float32() -> None:
    """Each is a sum over all tokens: in bf16 a sum of ones stops growing at 256."""
    tokens = 65_536
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, 4)), jnp.bfloat16)
    linear = Linear(4, 3, (None, None), True, jnp.float32, nnx.Rngs(0))
    norm = RMSNorm(4, 1e-6, jnp.float32)
    bias = nnx.jit(nnx.grad(lambda module: module(x).astype(jnp.float32).sum()))(linear).bias[...]
    np.testing.assert_allclose(bias, tokens, rtol=1e-6)
    scale = nnx.jit(nnx.grad(lambda module: module(x).astype(jnp.float32).sum()))(norm).scale[...]
    rounded = np.asarray(x, np.float64) / np.sqrt(np.mean(np.asarray(x, np.float64) ** 2, axis=-1, keepdims=True))
    # Each of 65,536 terms of size 1 is rounded to 8 bits at random: the sum is off by some 2**-9 * 256 = 0.5.
    np.testing.assert_allclose(scale, rounded.sum(axis=0), atol=3.0)
