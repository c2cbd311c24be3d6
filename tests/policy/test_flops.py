"""Operations of a forward pass, against figures worked out by hand and against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maestro_jax.policy.attention.interface import AttentionConfig
from maestro_jax.policy.config import PolicyArchitecture, TextConfig, VisionConfig
from maestro_jax.policy.flops import group_flops, root_flops
from maestro_jax.policy.model import Policy
from maestro_jax.policy.vision import ImageBatch, VisionModel
from tests.policy import reference

FOUR_B = PolicyArchitecture(
    TextConfig(151_936, 2560, 9728, 36, 32, 8, 128, 1e-6, 5e6, (24, 20, 20)),
    VisionConfig(24, 1024, 4096, 16, 3, 16, 2, 2, 2560, 2304, (5, 11, 17)),
    *(151_655, 151_652, 151_653, True),
)


def tera(root: int, prefix: int, members: int, room: int) -> float:
    return group_flops(FOUR_B, root, prefix, members, room, images=0, patches=0).total / 1e12


def test_a_group_at_the_4b_shape() -> None:
    """P = 4,096, R = 500, G = 8, worked out apart: 77 TFLOP, in eight whole rows 320; an image of 4,096 patches."""
    assert tera(0, 4096, 8, 500) == pytest.approx(77, rel=0.005)
    assert 8 * tera(0, 4096, 1, 500) == pytest.approx(320, rel=0.005)
    assert group_flops(FOUR_B, 0, 1, 1, 1, images=1, patches=4096).vision / 1e12 == pytest.approx(4.35, rel=0.005)


def test_a_root_and_groups_on_it_cost_what_longer_prefixes_do() -> None:
    whole = group_flops(FOUR_B, 0, 700, 3, 50, 0, 0)
    parts = root_flops(FOUR_B, 500), group_flops(FOUR_B, 500, 200, 3, 50, 0, 0)
    assert whole.total == sum(part.total for part in parts)


def test_xla_counts_the_same_decoder_and_head() -> None:
    """XLA also counts masked pairs, norms and rotations; at 25 tokens on wide layers that is nothing."""
    text = TextConfig(4096, 1024, 3072, 2, 8, 4, 128, 1e-6, 1e4, (24, 20, 20))
    vision = VisionConfig(2, 32, 48, 2, 3, 16, 2, 2, 1024, 64, (0, 1))
    architecture = dataclasses.replace(reference.architecture(), text=text, vision=vision)
    graph, params = nnx.split(nnx.eval_shape(lambda: Policy(architecture, nnx.Rngs(0))), nnx.Param)
    prompts = reference.collate([1], [reference.row(*range(5, 13))], width=8, per_group=1, patches=4)

    def forward(params: nnx.State, tokens: jax.Array) -> jax.Array:
        policy = nnx.merge(graph, params)
        last, hidden = policy.encode_groups(prompts, tokens, jnp.full((1, 2), 8))
        return policy.logits(hidden + last)

    counted = jax.jit(forward).lower(params, jax.ShapeDtypeStruct((1, 2, 8), jnp.int32)).cost_analysis()["flops"]
    wanted = root_flops(architecture, 1).total + group_flops(architecture, 1, 8, 2, 8, images=1, patches=4).total
    assert counted == pytest.approx(wanted, rel=0.03)


def test_xla_counts_the_same_tower() -> None:
    vision = VisionConfig(1, 512, 1024, 8, 3, 16, 2, 2, 256, 64, (0,))
    made = nnx.eval_shape(lambda: VisionModel(vision, jnp.float32, jnp.float32, False, AttentionConfig(), nnx.Rngs(0)))
    graph, params = nnx.split(made, nnx.Param)
    float32, int32 = (lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((2, 64, *shape), dtype) for dtype in "fi")
    images = ImageBatch(float32(1536), int32(4), float32(4), int32(2), jax.ShapeDtypeStruct((2, 64), bool))
    counted = jax.jit(lambda p, i: nnx.merge(graph, p)(i)).lower(params, images).cost_analysis()["flops"]
    wanted = group_flops(dataclasses.replace(FOUR_B, vision=vision), 0, 0, 0, 0, images=2, patches=64).vision
    assert counted == pytest.approx(wanted, rel=0.03)
