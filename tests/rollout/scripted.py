"""A policy whose next token depends on the last one only: it writes calls, answers and broken turns at random.

It stands in for `Policy` in the engine, so that episodes with real calls can be had without training.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maestro_jax.policy.attention.cascade import LaneKV, View
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.text import Context, LayerKV
from maestro_jax.policy.tokens import Tokens

Array = jax.Array
NEVER = -30.0


def transitions(turns: Sequence[str], after: int, tokens: Tokens, vocabulary: int) -> np.ndarray:
    """Logits `[V, V]` of each next token: how often it follows in `turns`, which begin behind token `after`."""
    counts = np.zeros((vocabulary, vocabulary), np.float32)
    counts[:, tokens.end_of_turn] = 1e-3
    for turn in turns:
        ids = [after, *tokens.encode(turn)]
        for last, following in zip(ids, ids[1:], strict=False):
            counts[last, following] += 1
    return np.where(counts > 0, np.log(np.maximum(counts, 1e-6)), NEVER)


class Bigram(nnx.Module):
    """The interface of `Policy` that a rollout uses; hidden states are logits."""

    def __init__(self, architecture: PolicyArchitecture, table: np.ndarray):
        # Hidden states are as wide as the vocabulary.
        self.architecture = dataclasses.replace(
            architecture, text=dataclasses.replace(architecture.text, hidden_size=len(table))
        )
        self.compute_dtype = jnp.float32
        self.table = nnx.Param(jnp.asarray(table), axes=(None, None))

    def encode_root(self, root: Array) -> Context:
        return self._context(root.shape)

    def encode_prompts(self, batch: PrefixBatch, root: Context) -> tuple[Context, Array]:
        last = jnp.take_along_axis(batch.tokens, batch.last[:, None], axis=1)[:, 0]
        return self._context(batch.tokens.shape), self.table[...][last]

    def for_decoding(self) -> "Bigram":
        return self

    def extend(
        self, tokens: Array, steps: Array, view: View, fresh: LaneKV, at: Array | int, mask: Array
    ) -> tuple[Array, LaneKV]:
        return self.table[...][tokens], fresh

    def logits(self, hidden: Array) -> Array:
        return hidden

    def _context(self, shape: tuple[int, ...]) -> Context:
        text = self.architecture.text
        zeros = jnp.zeros((*shape, text.num_key_value_heads, text.head_dim))
        layers = range(text.num_hidden_layers)
        return Context(LayerKV([zeros for _ in layers], [zeros for _ in layers]), jnp.ones(shape, bool))
