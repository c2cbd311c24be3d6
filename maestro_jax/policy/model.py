"""The policy as a whole: images and tokens in, hidden states out, in the group's shape.

Shapes: B groups, G members of a group, P prefix tokens, R member tokens, D width. A *root* is the
system prompt that every group of a run shares; a *prefix* is one task's images and question; the
members of a group continue that prefix. Each part is computed once, whatever continues it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from maestro_jax.parallel.sharding import keep_over_groups, over_groups, replicated
from maestro_jax.policy.attention.cascade import LaneKV, View
from maestro_jax.policy.attention.groups import GroupLayout, causal
from maestro_jax.policy.attention.interface import AttentionConfig
from maestro_jax.policy.config import PolicyArchitecture, Precision
from maestro_jax.policy.layers import Embedding, RMSNorm, cast
from maestro_jax.policy.text import Context, DecoderLayer, GroupRows, TextModel, extend
from maestro_jax.policy.vision import Leaf, VisionModel

Array = jax.Array
F = TypeVar("F", bound=Callable[..., Any])


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


def _at_own_precision(method: F) -> F:
    """A method whose products are traced at the precision of its object."""

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        with at_precision(self.precision):
            return method(self, *args)

    return run  # type: ignore[return-value]


def at_precision(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Products traced under it have this precision; the methods of a policy see to it themselves.

    A gradient needs it around the whole: backward passes of our own are traced when a method has long returned.
    """
    return jax.default_matmul_precision(precision)


class Policy(nnx.Module):
    """Qwen3-VL: a vision tower and a decoder, whose head may be tied to the embeddings.

    Args:
      param_dtype: of the stored parameters.
      compute_dtype: of activations; norms, softmax and logits are fp32 whatever it is.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
      attention: how attention of whole sequences is computed, the same numbers by other means.
      precision: of products of fp32 arrays, as `PolicyConfig.matmul_precision`.
    """

    def __init__(
        self,
        architecture: PolicyArchitecture,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        attention: AttentionConfig = AttentionConfig(),  # noqa: B008, frozen
        precision: Precision = "auto",
    ):
        text, vision = architecture.text, architecture.vision
        self.architecture = architecture
        stored, self.compute_dtype = jnp.dtype(param_dtype), jnp.dtype(compute_dtype)
        exact = self.compute_dtype == jnp.float32
        self.precision = ("highest" if exact else "default") if precision == "auto" else precision
        self.visual = VisionModel(vision, stored, self.compute_dtype, remat, attention, rngs)
        taps = len(vision.deepstack_visual_indexes)
        self.language_model = TextModel(text, taps, stored, remat, attention, rngs)
        if architecture.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = Embedding(text.vocab_size, text.hidden_size, ("vocab", "embed"), stored, rngs)

    @_at_own_precision
    def encode_root(self, root: Array) -> Context:
        """What every group attends to of the root's tokens `[P0]`: keys and values `[P0, K, H]` per layer."""
        return self.language_model.encode_root(*self._embed(root[None]))

    @_at_own_precision
    def encode_prompts(self, batch: PrefixBatch, root: Context) -> tuple[Context, Array]:
        """Encodes images and prefixes behind an encoded root, for members that will be decoded.

        Returns:
          What members attend to of the prefixes, `[B, P, K, H]` per layer, and the final hidden state of each
          prefix's last token `[B, D]`, from which every member's first token is predicted.
        """
        rows = self._prompt_rows(batch, *self._embed(batch.tokens))
        hidden, prefix = self.language_model.encode_rows(root, rows)
        return prefix, _last(hidden, batch)

    @_at_own_precision
    def encode_groups(self, batch: PrefixBatch, members: Array, length: Array) -> tuple[Array, Array]:
        """Runs whole groups at once, to be differentiated: every prefix once, its members on top of it.

        Args:
          members: int32 `[B, G, R]`, of which `length [B, G]` are real.

        Returns:
          The final hidden state of each prefix's last token `[B, D]`, and those of the members `[B, G, R, D]`.
        """
        root, tokens, of_members = self._embed(batch.root[None], batch.tokens, members)
        prompts = self._prompt_rows(batch, tokens)
        layout = GroupLayout(prompts.layout.prefix, *members.shape[1:])
        steps = jnp.broadcast_to(jnp.arange(layout.room), members.shape)
        rows = GroupRows(
            layout,
            keep_over_groups(layout.join(prompts.x, of_members)),
            layout.join(prompts.positions, member_positions(batch.next_position, steps)),
            layout.join(prompts.real, steps < length[..., None]),
            prompts.deepstack,
        )
        hidden = self.language_model(root, rows)
        return _last(hidden, batch), layout.of_members(hidden)

    def for_decoding(self) -> "DecodingPolicy":
        """The decoder with weights cut per layer, cast and gathered; make it outside the loop that decodes."""
        text = self.language_model
        layers, norm = text.layer_list(self.compute_dtype), cast(text.norm, self.compute_dtype)
        head = None if self.lm_head is None else self._table(self.lm_head)
        return DecodingPolicy(self._table(text.embed_tokens), layers, norm, head, self.precision)

    @_at_own_precision
    def logits(self, hidden: Array) -> Array:
        """fp32 logits `[..., V]` of final hidden states `[..., D]`."""
        return _logits(hidden, self._table(self._head))

    @property
    def head(self) -> Array:
        """The parameter `[V, D]` that gives logits."""
        return self._head.embedding[...]

    @property
    def _head(self) -> Embedding:
        return self.language_model.embed_tokens if self.lm_head is None else self.lm_head

    def _embed(self, *tokens: Array) -> tuple[Array, ...]:
        """Embedded tokens `[groups, ..., D]` of each array `[groups, ...]`."""
        return tuple(map(keep_over_groups, self.language_model.embed_tokens.lookups(tokens, self.compute_dtype)))

    def _table(self, embedding: Embedding) -> Array:
        return embedding.table(self.compute_dtype)

    def _prompt_rows(self, batch: PrefixBatch, embedded: Array) -> GroupRows:
        """Rows of the prefixes, embedded tokens `[B, P, D]`, with their images."""
        x, deepstack = self._with_images(batch, embedded)
        return GroupRows(causal(x.shape[1]), x, batch.positions, batch.mask, tuple(deepstack))

    def _with_images(self, batch: PrefixBatch, embedded: Array) -> tuple[Array, list[Array]]:
        """Embedded prefixes `[B, P, D]` with image tokens in place, and DeepStack additions like them."""
        groups = batch.tokens.shape[0]
        image_tokens, taps = self.visual(batch.images)
        is_image = (batch.image_index >= 0)[..., None]

        def place(features: Array) -> Array:
            features = features.reshape(groups, -1, features.shape[-1])
            index = jnp.maximum(batch.image_index, 0)[..., None]
            return keep_over_groups(jnp.take_along_axis(features, index, axis=1).astype(self.compute_dtype))

        x = jnp.where(is_image, place(image_tokens), embedded)
        return x, [jnp.where(is_image, place(tap), 0) for tap in taps]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingPolicy:
    """What decoding needs of a policy, in its compute dtype."""

    embedding: Array  # [V, D]
    layers: list[DecoderLayer]
    norm: RMSNorm
    head: Array | None  # [V, D]; None where the head is tied to the embedding
    precision: str = dataclasses.field(metadata={"static": True})

    @_at_own_precision
    def extend(
        self, tokens: Array, steps: Array, view: View, fresh: LaneKV, at: Array | int, mask: Array
    ) -> tuple[Array, LaneKV]:
        """Appends tokens `[D, S, T]` to lanes; the same function decodes one token and prefills observations.

        Args:
          steps: int32 `[D, S, T]`, number of each token among its member's tokens.
          view: what the lanes have computed before.
          fresh: keys and values of this program's tokens so far, per layer `[D, S, K, W, H]`.
          at: where among the W fresh tokens these T stand, in every lane.
          mask: bool `[D, S, T, W]`, which fresh tokens each token sees, itself among them.

        Returns:
          Final hidden states `[D, S, T, D]` and the fresh keys and values.
        """
        positions = view.next_position()[..., None] + steps
        positions = jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
        x = keep_over_groups(self.embedding[tokens])
        x, fresh = extend(self.layers, x, positions, view, fresh, at, mask)
        return self.norm(x), fresh

    @_at_own_precision
    def logits(self, hidden: Array) -> Array:
        """fp32 logits `[..., V]` of final hidden states `[..., D]`."""
        return _logits(hidden, self.embedding if self.head is None else self.head)


def _logits(hidden: Array, table: Array) -> Array:
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _last(rows: Array, batch: PrefixBatch) -> Array:
    """The state `[B, D]` of each prefix's last real token, of rows `[B, T, D]`."""
    return jnp.take_along_axis(rows, batch.last[:, None, None], axis=1)[:, 0]


def member_positions(next_position: Array, slots: Array) -> Array:
    """M-RoPE positions `[B, G, T, 3]` of member tokens: they continue the prefix, equal on all axes."""
    positions = next_position[:, None, None] + slots
    return jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
