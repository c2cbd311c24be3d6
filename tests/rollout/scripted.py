"""A policy whose next token depends on the last one only: it writes calls, answers and broken turns at random.

It stands in for `Policy` in the engine, so that episodes with real calls can be had without training.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
        self.architecture = architecture
        self.table = nnx.Param(jnp.asarray(table))

    def encode_prompts(self, batch: PrefixBatch) -> tuple[tuple[Context, Context], Array]:
        last = jnp.take_along_axis(batch.tokens, batch.last[:, None], axis=1)[:, 0]
        return (self._context(batch.root.shape), self._context(batch.tokens.shape)), self.table[...][last]

    def for_decoding(self) -> "Bigram":
        return self

    def extend(
        self, tokens: Array, slots: Array, next_position: Array, contexts: tuple[Context, ...], cache: LayerKV
    ) -> tuple[Array, LayerKV]:
        return self.table[...][tokens], cache

    def logits(self, hidden: Array) -> Array:
        return hidden

    def _context(self, shape: tuple[int, ...]) -> Context:
        text = self.architecture.text
        zeros = jnp.zeros((*shape, text.num_key_value_heads, text.head_dim))
        return Context(LayerKV([zeros], [zeros]), jnp.ones(shape, bool))
