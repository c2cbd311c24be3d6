"""The policy as a whole: images and tokens in, hidden states out, in the group's shape.

Shapes: B groups, G members of a group, P prefix tokens, R member tokens, D width. A *root* is the
system prompt that every group of a run shares; a *prefix* is one task's images and question; the
members of a group continue that prefix. Each part is computed once, whatever continues it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.parallel.sharding import over_groups, replicated
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.text import Context, LayerKV, TextModel
from maestro_jax.policy.vision import Leaf, VisionModel

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixBatch:
    """The prompts of B groups; prefixes are padded on the right."""

    root: Leaf  # int32 [P0]: tokens every group shares, not padded
    tokens: Leaf  # int32 [B, P]
    mask: Leaf  # bool [B, P]: True on real tokens
    positions: Leaf  # int32 [B, P, 3]: M-RoPE positions, after the root
    last: Leaf  # int32 [B]: index of each prefix's last real token
    next_position: Leaf  # int32 [B]: position of the first member token, on all three axes
    images: Leaf  # `ImageBatch`: B x M images, group by group, padded with empty ones
    image_index: Leaf  # int32 [B, P]: which of the group's image tokens stands here, -1 for text


def prompt_shardings(mesh: Mesh) -> PrefixBatch:
    """Shardings of a `PrefixBatch`, as a prefix tree."""
    groups = over_groups(mesh)
    return PrefixBatch(replicated(mesh), *[groups] * 7)


class Policy(nnx.Module):
    """Qwen3-VL: a vision tower and a decoder with a tied head."""

    def __init__(
        self,
        architecture: PolicyArchitecture,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype = jnp.float32,
        compute_dtype: jnp.dtype = jnp.float32,
    ):
        self.architecture = architecture
        self.compute_dtype = compute_dtype
        self.visual = VisionModel(architecture.vision, param_dtype, compute_dtype, rngs)
        self.language_model = TextModel(architecture.text, param_dtype, rngs)

    def embed(self, tokens: Array) -> Array:
        """Token embeddings in the compute dtype."""
        return self.language_model.embed_tokens(tokens).astype(self.compute_dtype)

    def encode_root(self, tokens: Array) -> Context:
        """Keys and values of the shared root, leaves `[P0, K, H]`."""
        length = tokens.shape[0]
        positions = jnp.broadcast_to(jnp.arange(length)[None, None, :, None], (1, 1, length, 3))
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        _, kv = self.language_model(self.embed(tokens)[None, None], positions, (), causal)
        return Context(jax.tree.map(lambda leaf: leaf[0, 0], kv), jnp.ones((length,), bool))

    def encode_prefix(self, batch: PrefixBatch, root: Context) -> tuple[Context, Array]:
        """Encodes images and prefixes once per group.

        Returns:
          The prefixes as a context (leaves `[B, P, K, H]`), and the final hidden state of each
          prefix's last token `[B, D]`, from which every member's first token is predicted.
        """
        x, deepstack = self._with_images(batch)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        mask = causal[None] & batch.mask[:, None, :]
        # A padding row sees itself, so that its softmax is never empty.
        mask = mask | jnp.eye(x.shape[1], dtype=bool)[None]
        hidden, kv = self.language_model(
            x[:, None], batch.positions[:, None], (root,), mask[:, None], [d[:, None] for d in deepstack]
        )
        last = jnp.take_along_axis(hidden[:, 0], batch.last[:, None, None], axis=1)[:, 0]
        return Context(jax.tree.map(lambda leaf: leaf[:, 0], kv), batch.mask), last

    def encode_members(
        self, tokens: Array, length: Array, next_position: Array, contexts: tuple[Context, ...]
    ) -> Array:
        """Final hidden states `[B, G, R, D]` of member tokens `[B, G, R]` of which `length [B, G]` are real."""
        steps = jnp.arange(tokens.shape[-1])
        positions = member_positions(next_position, jnp.broadcast_to(steps, tokens.shape))
        real = steps[None, None, None, :] < length[:, :, None, None]
        mask = (steps[:, None] >= steps[None, :])[None, None] & real
        mask = mask | jnp.eye(tokens.shape[-1], dtype=bool)[None, None]
        hidden, _ = self.language_model(self.embed(tokens), positions, contexts, mask)
        return hidden

    def extend(
        self,
        tokens: Array,
        slots: Array,
        next_position: Array,
        contexts: tuple[Context, ...],
        cache: LayerKV,
    ) -> tuple[Array, LayerKV]:
        """Appends tokens `[B, G, T]` at `slots [B, G, T]` of the members' cache `[B, G, R, K, H]`.

        A slot equal to the cache's length drops the token (padding, or a lane that stands still).
        The same function decodes one token a lane and prefills whole observations.

        Returns:
          Hidden states `[B, G, T, D]` and the updated cache.
        """
        width = cache.keys[0].shape[2]
        mask = slots[..., None] >= jnp.arange(width)[None, None, None, :]
        positions = member_positions(next_position, slots)
        return self.language_model(self.embed(tokens), positions, contexts, mask, cache=cache, slots=slots)

    def logits(self, hidden: Array) -> Array:
        """fp32 logits `[..., V]`."""
        return self.language_model.logits(hidden)

    def _with_images(self, batch: PrefixBatch) -> tuple[Array, list[Array]]:
        """Embedded prefixes `[B, P, D]` with image tokens in place, and DeepStack additions like them."""
        groups = batch.tokens.shape[0]
        image_tokens, taps = self.visual(batch.images)
        is_image = (batch.image_index >= 0)[..., None]

        def place(features: Array) -> Array:
            features = features.reshape(groups, -1, features.shape[-1])
            index = jnp.maximum(batch.image_index, 0)[..., None]
            return jnp.take_along_axis(features, index, axis=1).astype(self.compute_dtype)

        x = jnp.where(is_image, place(image_tokens), self.embed(batch.tokens))
        return x, [jnp.where(is_image, place(tap), 0) for tap in taps]


def member_positions(next_position: Array, slots: Array) -> Array:
    """M-RoPE positions `[B, G, T, 3]` of member tokens: they continue the prefix, equal on all axes."""
    positions = next_position[:, None, None] + slots
    return jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
