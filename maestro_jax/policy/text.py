"""The decoder of Qwen3-VL: grouped-query attention with q/k norms, SwiGLU, DeepStack additions."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from maestro_jax.policy.attention import Segment, attend
from maestro_jax.policy.config import TextConfig
from maestro_jax.policy.layers import Embedding, Linear, RMSNorm, stack, unstack
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
        """Normed, rotated queries `[B, G, T, N, H]`, keys and values `[B, G, T, K, H]` of `x [B, G, T, D]`."""
        h, head = self.input_layernorm(x), self.config.head_dim
        q = self.q_norm(self.q_proj(h).reshape(*h.shape[:-1], -1, head))
        k = self.k_norm(self.k_proj(h).reshape(*h.shape[:-1], -1, head))
        v = self.v_proj(h).reshape(*h.shape[:-1], -1, head)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: Array, queries: Array, segments: Sequence[Segment]) -> Array:
        """Attention output and MLP, each added to the residual `x [B, G, T, D]`."""
        mixed = attend(queries, segments, self.config.head_dim**-0.5)
        x = x + self.o_proj(mixed.reshape(*x.shape[:-1], -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(h)) * self.up_proj(h))


class TextModel(nnx.Module):
    """Token embeddings (tied with the head), decoder layers and the final norm."""

    def __init__(self, config: TextConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ("vocab", "embed"), dtype, rngs)
        self.layers = stack(lambda r: DecoderLayer(config, dtype, r), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(
        self,
        x: Array,
        positions: Array,
        contexts: Sequence[Context],
        mask: Array,
        deepstack: Sequence[Array] = (),
        cache: LayerKV | None = None,
        slots: Array | None = None,
    ) -> tuple[Array, LayerKV]:
        """Runs the decoder over new tokens.

        Args:
          x: embedded tokens `[B, G, T, D]`.
          positions: M-RoPE positions int32 `[B, G, T, 3]`.
          contexts: earlier stretches every token may attend to (root, prefix), as far as masked in.
          mask: bool `[B, G, T, P]`, which own keys each token sees; P is T, or the cache's length.
          deepstack: arrays like `x` added after the first layers (zero away from image tokens).
          cache: keys and values `[B, G, P, K, H]` per layer that the new ones are written into.
          slots: int32 `[B, G, T]`, where in the cache each token goes; out of range is dropped.

        Returns:
          Hidden states after the final norm `[B, G, T, D]`, and the new keys and values (without
          a cache) or the whole updated cache.
        """
        cos, sin = mrope(positions, self.config.rope_theta, self.config.mrope_section)
        keys, values = [], []
        for index, layer in enumerate(unstack(self.layers, self.config.num_hidden_layers)):
            q, k, v = layer.qkv(x, cos, sin)
            if cache is not None:
                k, v = _write(cache.keys[index], k, slots), _write(cache.values[index], v, slots)
            keys.append(k)
            values.append(v)
            seen = [Segment(c.kv.keys[index], c.kv.values[index], c.mask) for c in contexts]
            x = layer.finish(x, q, [*seen, Segment(k, v, mask)])
            if index < len(deepstack):
                x = x + deepstack[index]
        return self.norm(x), LayerKV(keys, values)

    def logits(self, hidden: Array) -> Array:
        """fp32 logits `[..., V]` of final hidden states `[..., D]` through the tied embedding."""
        table = self.embed_tokens.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _write(cache: Array, new: Array, slots: Array | None) -> Array:
    """Writes `new [B, G, T, K, H]` at `slots [B, G, T]` of `cache [B, G, P, K, H]`."""
    if slots is None:
        raise ValueError("a cache needs slots")
    b, g = jnp.arange(cache.shape[0])[:, None, None], jnp.arange(cache.shape[1])[None, :, None]
    return cache.at[b, g, slots].set(new.astype(cache.dtype), mode="drop")
