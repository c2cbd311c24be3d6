"""Every way to compute attention of whole sequences gives what the plain one gives, in value and in gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.attention.groups import GroupLayout, causal
from maestro_jax.policy.attention.interface import AttentionConfig, attend_groups, attend_images
from maestro_jax.policy.attention.splash import GroupMask, WholeMask, tiles
from tests.policy.attention import plain
from tests.policy.reference import assert_near

B, N, K, H, ROOT = 8, 4, 2, 16, 7
LAYOUT = GroupLayout(prefix=128, members=2, room=64)
OTHERS = {
    "blocks of 64": AttentionConfig("blocks", 64),
    "blocks that divide nothing": AttentionConfig("blocks", 50),
    "one block": AttentionConfig("blocks", 512),
    "splash, interpreted": AttentionConfig("splash_interpret", 128),
}
MESHES = {"one device": (1, 1, 1), "data 2, fsdp 2, tensor 2": (2, 2, 2), "fsdp 8": (1, 8, 1)}
TOLERANCE = 2e-6  # fp32, of the largest value: the order of sums differs, nothing else
PLAIN = None


def arrays(layout: GroupLayout, groups: int = B, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (groups, layout.length, N, H),
        "k": (groups, layout.length, K, H),
        "v": (groups, layout.length, K, H),
        "root_k": (ROOT, K, H),
        "root_v": (ROOT, K, H),
        "weights": (groups, layout.length, N, H),
    }
    return {name: jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def ragged(layout: GroupLayout, groups: int = B, seed: int = 0) -> jax.Array:
    """Real tokens bool `[B, T]`: prefixes and members of any length, members also of none."""
    rng = np.random.default_rng(seed)
    prefix = np.arange(layout.prefix) < rng.integers(1, layout.prefix + 1, (groups, 1))
    lengths = rng.integers(0, layout.room + 1, (groups, layout.members, 1))
    members = np.arange(layout.room) < lengths
    return jnp.asarray(np.concatenate([prefix, members.reshape(groups, -1)], axis=1))


def value_and_gradients(
    x: dict[str, jax.Array], real: jax.Array, layout: GroupLayout, config: AttentionConfig | None
) -> Any:
    """Of a weighted sum of the outputs of real tokens."""

    def value(x: dict[str, jax.Array]) -> jax.Array:
        root = (x["root_k"], x["root_v"])
        given = x["q"] * H**-0.5, x["k"], x["v"], root, real, layout
        out = plain.attend_groups(*given) if config is PLAIN else attend_groups(*given, config)
        return jnp.sum(out * x["weights"] * real[..., None, None])

    return jax.jit(jax.value_and_grad(value))(x)


def assert_same(found: Any, wanted: Any) -> None:
    # The sum cancels; its terms do not.
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-3)
    for name, gradient in wanted[1].items():
        assert float(jnp.abs(gradient).max()) > 1e-2, f"{name} takes no part"
        assert_near(found[1][name], gradient, TOLERANCE, name)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_groups(config: AttentionConfig, axes: tuple[int, int, int]) -> None:
    x, real = arrays(LAYOUT), ragged(LAYOUT)
    wanted = value_and_gradients(x, real, LAYOUT, PLAIN)
    with jax.set_mesh(make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])):
        assert_same(value_and_gradients(x, real, LAYOUT, config), wanted)


@settings(max_examples=20, deadline=None)
@given(
    st.builds(GroupLayout, st.integers(1, 40), st.integers(0, 3), st.integers(1, 9)),
    st.integers(1, 50),
    st.integers(0, 99),
)
def test_blocks_of_any_layout(layout: GroupLayout, block: int, seed: int) -> None:
    x, real = arrays(layout, 2, seed), ragged(layout, 2, seed)
    found, wanted = (value_and_gradients(x, real, layout, c) for c in (AttentionConfig("blocks", block), PLAIN))
    for name, gradient in wanted[1].items():
        assert_near(found[1][name], gradient, 1e-5, name)


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_images(config: AttentionConfig) -> None:
    x, layout = arrays(causal(128), 3), causal(128)
    k, v = (jnp.repeat(x[name], N // K, axis=2) for name in ("k", "v"))
    real = ragged(layout, 3)

    def outputs(config: AttentionConfig | None) -> Any:
        def value(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if config is PLAIN:
                out = plain.attend(q, k, v, jnp.broadcast_to(real[:, None], (3, 128, 128)))
            else:
                out = attend_images(q, k, v, real, config)
            return jnp.sum(out * x["weights"] * real[..., None, None])

        return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(x["q"], k, v)

    for found, wanted in zip(outputs(config), outputs(PLAIN), strict=True):
        assert_near(found, wanted, TOLERANCE, "gradient")


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_a_row_of_nothing_but_padding_stays_finite(config: AttentionConfig) -> None:
    x = arrays(LAYOUT, 1)
    real = jnp.zeros((1, LAYOUT.length), bool)
    out = attend_groups(x["q"], x["k"], x["v"], None, real, LAYOUT, config)
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize("left_behind", [np.nan, np.inf])
@pytest.mark.parametrize("config", [OTHERS["blocks of 64"], OTHERS["splash, interpreted"]], ids=["blocks", "splash"])
def test_nothing_on_padding_is_multiplied(config: AttentionConfig, left_behind: float) -> None:
    """Neither forwards nor backwards: a weight of zero, or a gradient of zero, times NaN is NaN."""
    x, real = arrays(LAYOUT, 2), ragged(LAYOUT, 2)
    assert not real.all()
    spoilt = {name: jnp.where(real[..., None, None], x[name], left_behind) for name in ("q", "k", "v")}
    found, wanted = (value_and_gradients(given, real, LAYOUT, config) for given in (x | spoilt, x))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

    @jax.jit
    @jax.grad
    def of_images(qkv: list[jax.Array]) -> jax.Array:
        return jnp.sum(attend_images(*qkv, real, config) * x["weights"] * real[..., None, None])

    k, v = (x[name].repeat(N // K, axis=2) for name in ("k", "v"))
    clean = [x["q"], k, v]
    dirty = [jnp.where(real[..., None, None], each, left_behind) for each in clean]
    jax.tree.map(np.testing.assert_array_equal, of_images(dirty), of_images(clean))


def test_blocks_sum_gradients_of_shared_keys_in_float32() -> None:
    """512 queries weigh one key alike: in bfloat16 a sum of ones over blocks stops growing at 256."""
    layout = causal(512)
    ones = jnp.ones((1, 512, 1, 16), jnp.bfloat16)
    nothing = jnp.zeros_like(ones)

    def value(v: jax.Array) -> jax.Array:
        out = attend_images(nothing, nothing, v, jnp.ones((1, 512), bool), AttentionConfig("blocks", 1))
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(value))(ones).astype(jnp.float32)
    assert layout.length == 512
    np.testing.assert_allclose(gradient, 1.0, rtol=2**-7)


def test_the_mask_of_a_layout() -> None:
    layout = GroupLayout(2, 2, 2)
    at = np.arange(layout.length)
    sees = layout.sees(at[:, None], at[None, :]).astype(int).tolist()
    assert sees == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_splash_says_which_lengths_it_needs() -> None:
    layout = dataclasses.replace(LAYOUT, room=65)
    x = arrays(layout, 1)
    with pytest.raises(ConfigError, match="multiple of 128 tokens, found 258; choose config.policy.prefix_buckets"):
        value_and_gradients(x, ragged(layout, 1), layout, AttentionConfig("splash_interpret"))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="'flash' is unknown; use one of blocks, splash"):
        AttentionConfig("flash")


@pytest.mark.parametrize(
    ("length", "before", "keys", "tile"),
    [
        (8192, 271, 8704, 512),  # whole lanes are 67 x 128
        (8192, 0, 8192, 512),
        (640, 0, 640, 128),  # larger tiles would need a fifth more keys
        (128, 7, 256, 256),
    ],
)
def test_keys_of_splash_are_filled_up_to_large_tiles(length: int, before: int, keys: int, tile: int) -> None:
    mask = GroupMask(causal(length), before, block=512)
    assert mask.shape == (length, keys)
    sizes = tiles(mask)
    assert (sizes.block_kv, sizes.block_kv_dkv, sizes.block_kv_dq) == (tile, tile, tile)
    last = mask[length - 1 : length, :]
    assert last.sum() == before + length  # what is filled up nobody sees


def test_filled_keys_of_images_are_seen_by_nobody() -> None:
    mask = WholeMask(384 + 8192, block=512)
    assert mask.shape == (8576, 8704) and mask[5:6, :].sum() == 8576
