"""The vision tower of Qwen3-VL: patches in, image tokens and DeepStack features out.

Images are the batch axis, patches are padded to a bucket: attention is full within an image and
never crosses one. All index work (patch order, interpolation, rope ids) was done on the host
(`preprocess.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maestro_jax.parallel.sharding import keep_over_groups
from maestro_jax.policy.attention.interface import AttentionConfig, attend_images
from maestro_jax.policy.config import VisionConfig
from maestro_jax.policy.layers import Embedding, LayerNorm, Linear, scan_layers, stack
from maestro_jax.policy.rope import rotate, vision_rope

Array = jax.Array
# A leaf of a bundle: an array on the mesh, numpy before it gets there, or its sharding in a tree of shardings.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """Patched images, in merge-block order (the 2 x 2 patches of one token are neighbours)."""

    patches: Leaf  # float32 [I, N, channels * temporal * patch * patch]
    table_index: Leaf  # int32 [I, N, 4]: corners in the position table
    table_weight: Leaf  # float32 [I, N, 4]: bilinear weights of the corners
    grid: Leaf  # int32 [I, N, 2]: row and column of the patch
    mask: Leaf  # bool [I, N]: False on padding


class VisionBlock(nnx.Module):
    """Pre-norm transformer block; tanh GELU in the MLP."""

    def __init__(self, config: VisionConfig, dtype: jnp.dtype, attention: AttentionConfig, rngs: nnx.Rngs):
        width, mlp = config.hidden_size, config.intermediate_size
        self.heads = config.num_heads
        self.attention = attention
        self.norm1 = LayerNorm(width, dtype)
        self.norm2 = LayerNorm(width, dtype)
        self.qkv = Linear(width, 3 * width, ("vision_embed", "vision_heads"), True, dtype, rngs)
        self.proj = Linear(width, width, ("vision_heads", "vision_embed"), True, dtype, rngs)
        self.fc1 = Linear(width, mlp, ("vision_embed", "vision_mlp"), True, dtype, rngs)
        self.fc2 = Linear(mlp, width, ("vision_mlp", "vision_embed"), True, dtype, rngs)

    def __call__(self, x: Array, cos: Array, sin: Array, mask: Array) -> Array:
        """x `[I, N, width]`, angles `[I, N, head / 2]`, mask `[I, N]`."""
        images, patches, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(images, patches, 3, self.heads, width // self.heads)
        q = rotate(qkv[:, :, 0], cos, sin, (width // self.heads) ** -0.5)
        mixed = attend_images(q, rotate(qkv[:, :, 1], cos, sin), qkv[:, :, 2], mask, self.attention)
        x = keep_over_groups(x + self.proj(mixed.reshape(images, patches, width)))
        return keep_over_groups(x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True)))


class PatchMerger(nnx.Module):
    """Joins merge x merge patches into one token; exact GELU (unlike the blocks)."""

    def __init__(self, config: VisionConfig, norm_after_join: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_join = norm_after_join
        self.norm = LayerNorm(self.joined if norm_after_join else config.hidden_size, dtype)
        self.fc1 = Linear(self.joined, self.joined, ("vision_embed", "vision_mlp"), True, dtype, rngs)
        self.fc2 = Linear(self.joined, config.out_hidden_size, ("vision_mlp", "embed"), True, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """`[I, N, width]` → `[I, N / merge², out]`."""
        x = x if self.norm_after_join else self.norm(x)
        x = x.reshape(x.shape[0], -1, self.joined)
        x = self.norm(x) if self.norm_after_join else x
        return keep_over_groups(self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))


class VisionModel(nnx.Module):
    """Patch embedding, interpolated positions, blocks, merger and DeepStack mergers."""

    def __init__(
        self,
        config: VisionConfig,
        dtype: jnp.dtype,
        compute_dtype: jnp.dtype,
        remat: bool,
        attention: AttentionConfig,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.patch_embed = Linear(channels, config.hidden_size, (None, "vision_embed"), True, dtype, rngs)
        self.pos_embed = Embedding(
            config.num_position_embeddings, config.hidden_size, (None, "vision_embed"), dtype, rngs
        )
        self.blocks = stack(lambda r: VisionBlock(config, dtype, attention, r), config.depth, rngs)
        self.merger = PatchMerger(config, False, dtype, rngs)
        self.deepstack_mergers = nnx.List(
            [PatchMerger(config, True, dtype, rngs) for _ in config.deepstack_visual_indexes]
        )

    def __call__(self, images: ImageBatch) -> tuple[Array, list[Array]]:
        """Encodes images.

        Returns:
          Image tokens `[I, N / merge², D]` and one such array per DeepStack tap.
        """
        x = self.patch_embed(images.patches.astype(self.compute_dtype))
        corners = self.pos_embed(images.table_index)  # [I, N, 4, width]
        x = keep_over_groups(x + jnp.einsum("inc,incw->inw", images.table_weight, corners).astype(x.dtype))
        cos, sin = vision_rope(images.grid, self.config.hidden_size // self.config.num_heads)
        tapped = np.array(self.config.deepstack_visual_indexes, np.int32)

        def step(
            block: VisionBlock, carry: tuple[Array, Array, Array], given: None
        ) -> tuple[tuple[Array, Array, Array], None]:
            index, x, taps = carry
            x = block(x, cos, sin, images.mask)
            here = (tapped == index)[:, None, None, None]
            return (index + 1, x, jnp.where(here, x, taps)), None

        # The taps travel along, so that the scan does not have to give back the output of every block.
        taps = jnp.zeros((len(tapped), *x.shape), x.dtype)
        (_, x, taps), _ = scan_layers(self.blocks, step, (jnp.zeros((), jnp.int32), x, taps), None, self.remat)
        return self.merger(x), [merger(tap) for merger, tap in zip(self.deepstack_mergers, taps, strict=True)]
