"""The decoder of Qwen3-VL: grouped-query attention with q/k norms, SwiGLU, DeepStack additions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from maestro_jax.parallel.sharding import keep_over_groups
from maestro_jax.policy.attention.cascade import LaneKV, View
from maestro_jax.policy.attention.groups import GroupLayout, causal
from maestro_jax.policy.attention.interface import AttentionConfig, attend_groups
from maestro_jax.policy.config import TextConfig
from maestro_jax.policy.layers import Embedding, Linear, RMSNorm, cast, run_layer, scan_layers, stack, unstack
from maestro_jax.policy.rope import mrope, rotate

Array = jax.Array
KV = tuple[Array, Array]  # keys and values of one layer
C = TypeVar("C")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys and values of every decoder layer, in a list."""

    keys: list[Array]  # L x [..., P, K, H]
    values: list[Array]  # L x [..., P, K, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """One stretch of already computed tokens that later tokens attend to (a root or a prefix)."""

    kv: LayerKV  # leaves [P, K, H] or [B, P, K, H]
    mask: Array  # bool [P] or [B, P]


@dataclasses.dataclass(frozen=True)
class GroupRows:
    """New tokens of a pass, a row a group (`GroupLayout`).

    Attributes:
      x: embedded tokens `[B, T, D]`.
      positions: M-RoPE positions int32 `[B, T, 3]`.
      real: bool `[B, T]`, False on padding.
      deepstack: arrays `[B, P, D]`, added to the prefixes after the first layers (zero away from image tokens).
    """

    layout: GroupLayout
    x: Array
    positions: Array
    real: Array
    deepstack: tuple[Array, ...]

    def with_tap(self, x: Array, index: int) -> Array:
        """`x [B, T, D]` and the DeepStack features behind layer number `index`."""
        return x.at[:, : self.layout.prefix].add(self.deepstack[index])


class DecoderLayer(nnx.Module):
    """One pre-norm block. Linear weights keep Hugging Face's names."""

    def __init__(self, config: TextConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        width, head = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_attention_heads * head, config.num_key_value_heads * head
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps, dtype)
        self.q_norm = RMSNorm(head, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(head, config.rms_norm_eps, dtype)
        self.q_proj = Linear(width, q_width, ("embed", "heads"), False, dtype, rngs)
        self.k_proj = Linear(width, kv_width, ("embed", "kv_heads"), False, dtype, rngs)
        self.v_proj = Linear(width, kv_width, ("embed", "kv_heads"), False, dtype, rngs)
        self.o_proj = Linear(q_width, width, ("heads", "embed"), False, dtype, rngs)
        self.gate_proj = Linear(width, config.intermediate_size, ("embed", "mlp"), False, dtype, rngs)
        self.up_proj = Linear(width, config.intermediate_size, ("embed", "mlp"), False, dtype, rngs)
        self.down_proj = Linear(config.intermediate_size, width, ("mlp", "embed"), False, dtype, rngs)
        self._start_as_a_copier()

    def _start_as_a_copier(self) -> None:
        """Makes attention pass on what it attends to, and keeps the rest of the layer small at first.

        The output projection starts near the transpose of the value projection (Trockman and Kolter
        2023, "Mimetic initialization of self-attention layers"). A policy trained from nothing learns
        to quote an observation in fewer steps so. Loaded checkpoints overwrite it.
        """
        config = self.config
        values = self.v_proj.kernel[...].reshape(config.hidden_size, config.num_key_value_heads, config.head_dim)
        values = jnp.repeat(values, config.num_attention_heads // config.num_key_value_heads, axis=1)
        self.o_proj.kernel[...] = 0.1 * self.o_proj.kernel[...] + 0.5 * values.reshape(config.hidden_size, -1).T
        self.down_proj.kernel[...] = 0.1 * self.down_proj.kernel[...]

    def qkv(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Normed, rotated and scaled queries `[..., T, N, H]`, keys and values `[..., T, K, H]` of `x [..., T, D]`."""
        return self.rotated(*self.project(x), cos, sin)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries `[..., T, N H]`, keys and values `[..., T, K H]` of `x [..., T, D]`, not yet cut into heads."""
        h = self.input_layernorm(x)
        return self.q_proj(h), self.k_proj(h), self.v_proj(h)

    def rotated(self, q: Array, k: Array, v: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """What `project` gives as `[..., T, heads, H]`; queries and keys normed and rotated, queries scaled."""
        q, k, v = (each.reshape(*each.shape[:-1], -1, self.config.head_dim) for each in (q, k, v))
        scale = self.config.head_dim**-0.5
        return rotate(self.q_norm(q), cos, sin, scale), rotate(self.k_norm(k), cos, sin), v

    def finish(self, x: Array, mixed: Array) -> Array:
        """Adds the projection of attention `mixed [..., T, N, H]`, then the MLP, to the residual `x [..., T, D]`."""
        x = keep_over_groups(x + self.o_proj(mixed.reshape(*x.shape[:-1], -1)))
        h = self.post_attention_layernorm(x)
        return keep_over_groups(x + self.down_proj(jax.nn.silu(self.gate_proj(h)) * self.up_proj(h)))


class TextModel(nnx.Module):
    """Token embeddings, decoder layers and the final norm.

    The layers after which DeepStack features are added differ from the others in that, so they stand
    apart; the others are stacked and scanned.
    """

    def __init__(
        self,
        config: TextConfig,
        deepstack: int,
        dtype: jnp.dtype,
        remat: bool,
        attention: AttentionConfig,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.remat = remat
        self.attention = attention
        self.rest = config.num_hidden_layers - deepstack

        def make(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, dtype, rngs)

        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ("vocab", "embed"), dtype, rngs)
        self.deepstack_layers = nnx.List([make(rngs) for _ in range(deepstack)])
        self.layers = stack(make, self.rest, rngs) if self.rest else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(self, root: Array, groups: GroupRows) -> Array:
        """Runs all layers over the root `[1, P0, D]` and the rows of all groups at once, to be differentiated.

        One pass over the layers serves root, prefixes and members: weights are gathered once, and no
        layer's keys and values outlive the layer.

        Returns:
          Final hidden states `[B, T, D]`.
        """
        through_root, through_rows = self._root_step(root.shape[1]), self._row_step(groups)

        def step(layer: DecoderLayer, xs: tuple[Array, Array], given: None) -> tuple[tuple[Array, Array], None]:
            root, x = xs
            root, before = through_root(layer, root)
            return (root, through_rows(layer, x, before)[0]), None

        def tap(xs: tuple[Array, Array], index: int) -> tuple[Array, Array]:
            return xs[0], groups.with_tap(xs[1], index)

        nothing = [None] * self.config.num_hidden_layers
        (_, x), _ = self._through_layers(step, (root, groups.x), tap, nothing)
        return self.norm(x)

    def encode_root(self, root: Array) -> Context:
        """What later tokens attend to of the embedded root `[1, P0, D]`: leaves `[P0, K, H]`."""
        through_root = self._root_step(root.shape[1])

        def step(layer: DecoderLayer, x: Array, given: None) -> tuple[Array, KV]:
            return through_root(layer, x)

        nothing = [None] * self.config.num_hidden_layers
        _, kept = self._through_layers(step, root, lambda x, index: x, nothing)
        return _context(kept, jnp.ones(root.shape[1], bool))

    def encode_rows(self, root: Context, groups: GroupRows) -> tuple[Array, Context]:
        """Runs prompts behind a root that was encoded before.

        Returns:
          Final hidden states `[B, P, D]`, and what members attend to of them: leaves `[B, P, K, H]`.
        """
        through_rows = self._row_step(groups)

        def step(layer: DecoderLayer, x: Array, before: KV) -> tuple[Array, KV]:
            return through_rows(layer, x, before)

        given = list(zip(root.kv.keys, root.kv.values, strict=True))
        x, kept = self._through_layers(step, groups.x, groups.with_tap, given)
        return self.norm(x), _context(kept, groups.real)

    def _root_step(self, length: int) -> Callable[[DecoderLayer, Array], tuple[Array, KV]]:
        """A layer over the root: its output, and keys and values `[P0, K, H]`."""
        positions = jnp.broadcast_to(jnp.arange(length)[None, :, None], (1, length, 3))
        angles = mrope(positions, self.config.rope_theta, self.config.mrope_section)
        # The root has any length, and it is short: no kernel for it.
        config = self.attention
        if config.backend.startswith("splash"):
            config = dataclasses.replace(config, backend="blocks")
        whole = jnp.ones((1, length), bool)

        def step(layer: DecoderLayer, x: Array) -> tuple[Array, KV]:
            q, k, v = layer.qkv(x, *angles)
            x = layer.finish(x, attend_groups(q, k, v, None, whole, causal(length), config))
            return x, (k[0], v[0])

        return step

    def _row_step(self, groups: GroupRows) -> Callable[[DecoderLayer, Array, KV], tuple[Array, KV]]:
        """A layer over the rows of groups: its output, and keys and values of all their tokens `[B, T, K, H]`."""
        angles = mrope(groups.positions, self.config.rope_theta, self.config.mrope_section)

        def step(layer: DecoderLayer, x: Array, before: KV) -> tuple[Array, KV]:
            q, k, v = layer.qkv(x, *angles)
            mixed = attend_groups(q, k, v, before, groups.real, groups.layout, self.attention)
            return layer.finish(x, mixed), (k, v)

        return step

    def _through_layers(
        self,
        step: Callable[[DecoderLayer, C, Any], tuple[C, Any]],
        carry: C,
        tap: Callable[[C, int], C],
        given: Sequence[Any],
    ) -> tuple[C, list[Any]]:
        """`step(layer, carry, given)` through all layers, DeepStack features being added by `tap(carry, layer)`.

        Returns:
          The last carry, and what the steps returned beside it, layer by layer.
        """
        kept = []
        for index, layer in enumerate(self.deepstack_layers):
            carry, one = run_layer(layer, step, carry, given[index], self.remat)
            carry = tap(carry, index)
            kept.append(one)
        if self.layers is not None:
            rest = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given[len(kept) :])
            carry, stacked = scan_layers(self.layers, step, carry, rest, self.remat)
            kept += [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(self.rest)]
        return carry, kept

    def layer_list(self, dtype: jnp.dtype) -> list[DecoderLayer]:
        """Every layer as a module of its own, its weights cast: for programs that run them many times."""
        rest = [] if self.layers is None else unstack(self.layers, self.rest)
        return [cast(layer, dtype) for layer in (*self.deepstack_layers, *rest)]


def _context(kept: Sequence[KV], mask: Array) -> Context:
    return Context(LayerKV([keys for keys, _ in kept], [values for _, values in kept]), mask)


def extend(
    layers: Sequence[DecoderLayer], x: Array, positions: Array, view: View, fresh: LaneKV, at: Array | int, mask: Array
) -> tuple[Array, LaneKV]:
    """Runs new tokens of lanes through the layers; their keys and values join the fresh ones.

    A plain loop with a list per layer: a stacked cache carried through a scan would be copied at each.

    Args:
      x: embedded tokens `[D, S, T, D]`.
      positions: M-RoPE positions int32 `[D, S, T, 3]`.
      view: what the lanes have computed before.
      fresh: keys and values of this program's tokens so far, per layer `[D, S, K, W, H]`.
      at: int32 `[]`, where among the W fresh tokens these T stand, in every lane.
      mask: bool `[D, S, T, W]`, which fresh tokens each token sees, itself among them.

    Returns:
      Hidden states before the final norm `[D, S, T, D]`, and the fresh keys and values.
    """
    config = layers[0].config
    cos, sin = mrope(positions, config.rope_theta, config.mrope_section)
    keys, values = [], []
    for index, layer in enumerate(layers):
        # Without the barrier XLA for TPUs has matmuls write heads, and copies the kernels to another layout for that.
        q, k, v = jax.lax.optimization_barrier(layer.project(x))
        q, k, v = layer.rotated(q, k, v, cos, sin)
        keys.append(_join(fresh.keys[index], k, at))
        values.append(_join(fresh.values[index], v, at))
        mixed = view.attend(index, q, (keys[-1], values[-1], mask))
        x = layer.finish(x, mixed)
    return x, LaneKV(keys, values)


def _join(fresh: Array, new: Array, at: Array | int) -> Array:
    """`new [D, S, T, K, H]` at the tokens `at ...` of `fresh [D, S, K, W, H]`."""
    return jax.lax.dynamic_update_slice_in_dim(fresh, jnp.moveaxis(new, 2, 3).astype(fresh.dtype), at, axis=3)
