"""The decoder of Qwen3-VL: grouped-query attention with q/k norms, SwiGLU, DeepStack additions."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from maestro_jax.parallel.sharding import keep_over_groups
from maestro_jax.policy.attention import AttentionConfig, Segment, attend, attend_groups
from maestro_jax.policy.config import TextConfig
from maestro_jax.policy.groups import GroupLayout, causal
from maestro_jax.policy.layers import Embedding, Linear, RMSNorm, cast, run_layer, scan_layers, stack, unstack
from maestro_jax.policy.rope import mrope, rotate

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKV:
    """Keys and values of every decoder layer, a list per layer (a stacked cache would be copied at each)."""

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
        """Normed, rotated queries `[..., T, N, H]`, keys and values `[..., T, K, H]` of `x [..., T, D]`."""
        h, head = self.input_layernorm(x), self.config.head_dim
        q = self.q_norm(self.q_proj(h).reshape(*h.shape[:-1], -1, head))
        k = self.k_norm(self.k_proj(h).reshape(*h.shape[:-1], -1, head))
        v = self.v_proj(h).reshape(*h.shape[:-1], -1, head)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    @property
    def scale(self) -> float:
        return self.config.head_dim**-0.5

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

    def __call__(self, root: Array, groups: GroupRows, keep_kv: bool) -> tuple[Array, list[Context]]:
        """Runs all layers over the root `[1, P0, D]` and the rows of all groups at once.

        One pass over the layers serves root, prefixes and members: weights are gathered once, and no
        layer's keys and values outlive the layer unless they are asked for.

        Returns:
          Final hidden states `[B, T, D]`, and with `keep_kv` root and prefixes as contexts of later tokens.
        """
        layout, length = groups.layout, root.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length)[None, :, None], (1, length, 3))
        config = self.config
        root_angles, angles = (mrope(p, config.rope_theta, config.mrope_section) for p in (positions, groups.positions))
        # The root has any length, and it is short: no kernel for it.
        for_root = self.attention
        if for_root.backend.startswith("splash"):
            for_root = dataclasses.replace(for_root, backend="blocks")
        whole = jnp.ones((1, length), bool)

        def step(layer: DecoderLayer, xs: tuple[Array, Array]) -> tuple[tuple[Array, Array], list[tuple[Array, Array]]]:
            root, x = xs
            q, k, v = layer.qkv(root, *root_angles)
            before = (k[0], v[0])
            root = layer.finish(root, attend_groups(q, k, v, None, whole, causal(length), layer.scale, for_root))
            q, k, v = layer.qkv(x, *angles)
            x = layer.finish(x, attend_groups(q, k, v, before, groups.real, layout, layer.scale, self.attention))
            kept = [before, (k[:, : layout.prefix], v[:, : layout.prefix])]
            return (root, x), kept if keep_kv else []

        xs, kept = (root, groups.x), []
        for index, layer in enumerate(self.deepstack_layers):
            (root, x), shared = run_layer(layer, step, xs, self.remat)
            xs = (root, x.at[:, : layout.prefix].add(groups.deepstack[index]))
            kept.append(shared)
        if self.layers is not None:
            xs, stacked = scan_layers(self.layers, step, xs, self.remat)
            kept += [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(self.rest)]
        masks = (whole[0], groups.real[:, : layout.prefix])
        return self.norm(xs[1]), _contexts(masks, kept) if keep_kv else []

    def layer_list(self, dtype: jnp.dtype) -> list[DecoderLayer]:
        """Every layer as a module of its own, its weights cast: for programs that run them many times."""
        rest = [] if self.layers is None else unstack(self.layers, self.rest)
        return [cast(layer, dtype) for layer in (*self.deepstack_layers, *rest)]


def _contexts(masks: Sequence[Array], kept: Sequence[Sequence[tuple[Array, Array]]]) -> list[Context]:
    """Per layer and context (keys, values) → contexts."""
    return [
        Context(LayerKV([layer[i][0] for layer in kept], [layer[i][1] for layer in kept]), mask)
        for i, mask in enumerate(masks)
    ]


def extend_cache(
    layers: Sequence[DecoderLayer],
    x: Array,
    positions: Array,
    contexts: Sequence[Context],
    mask: Array,
    cache: LayerKV,
    slots: Array,
) -> tuple[Array, LayerKV]:
    """Runs new member tokens through the layers, their keys and values going into a cache.

    A plain loop with a list per layer: a stacked cache carried through a scan would be copied at each.

    Args:
      x: embedded tokens `[B, G, T, D]`.
      positions: M-RoPE positions int32 `[B, G, T, 3]`.
      contexts: earlier stretches every token may attend to (root, prefix), as far as masked in.
      mask: bool `[B, G, T, P]`, which slots of the cache each token sees.
      cache: keys and values `[B, G, P, K, H]` per layer.
      slots: int32 `[B, G, T]`, where in the cache each token goes; out of range is dropped.

    Returns:
      Hidden states before the final norm `[B, G, T, D]`, and the updated cache.
    """
    config = layers[0].config
    cos, sin = mrope(positions, config.rope_theta, config.mrope_section)
    keys, values = [], []
    for index, layer in enumerate(layers):
        q, k, v = layer.qkv(x, cos, sin)
        keys.append(_write(cache.keys[index], k, slots))
        values.append(_write(cache.values[index], v, slots))
        seen = [Segment(c.kv.keys[index], c.kv.values[index], c.mask) for c in contexts]
        x = layer.finish(x, attend(q, [*seen, Segment(keys[-1], values[-1], mask)], layer.scale))
    return x, LayerKV(keys, values)


def _write(cache: Array, new: Array, slots: Array) -> Array:
    """Writes `new [B, G, T, K, H]` at `slots [B, G, T]` of `cache [B, G, P, K, H]`."""
    b, g = jnp.arange(cache.shape[0])[:, None, None], jnp.arange(cache.shape[1])[None, :, None]
    return cache.at[b, g, slots].set(new.astype(cache.dtype), mode="drop")
