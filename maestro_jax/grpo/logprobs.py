"""Log-probabilities of the tokens in the loss from hidden states, without ever holding `[tokens, vocabulary]`.

In: final hidden states, the head's table, and which member tokens are in the loss. Out: log-probabilities and
entropies. Observations and padding get no logits: a group's rows in the loss are compacted to `[B, M]` first. Of these
rows the logits of a piece of the vocabulary exist at a time, forward and backward. The vocabulary is cut and not the
rows: so each row of the table is read once a pass, and its gradient is one sum, written (and, over devices, reduced)
once, where pieces of the rows would each read and write a gradient of the whole table.

Shapes: B groups, G members of a group, R tokens of a member, M rows of a group in the loss, D width, V vocabulary, S
shards of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from maestro_jax.parallel.mesh import BATCH_AXES
from maestro_jax.parallel.sharding import ShardingRules, gather_over_fsdp, sum_over_batch

Array = jax.Array
C = TypeVar("C")
Moments = tuple[Array, Array, Array]  # of logits z: the largest m, the sums of exp(z - m) and of exp(z - m) (z - m)

TABLE_AXES = ("vocab", "embed")  # logical axes of the head's table
ROW_QUARTERS = (2, 3, 4)  # M in quarters of G x R: so many programs at most, and few rows that only pad


# ---- rows in the loss --------------------------------------------------------------------------------------


def loss_rows(mask: np.ndarray, most: int = 0) -> np.ndarray:
    """The member tokens in the loss, compacted per group; on the host, because M is a static shape.

    Args:
      mask: bool `[B, G, R]`, tokens in the loss.
      most: tokens in the loss of the group that has most, where that is a group of another process or batch.

    Returns:
      int32 `[B, M]`, ascending indices into the G x R tokens of each group, filled up with G x R, which is none of
      them. M is the bucket of the group that has most.
    """
    flat = mask.reshape(len(mask), -1)
    tokens = flat.shape[1]
    most = int(flat.sum(axis=1).max(initial=most))
    widths = [-(-tokens * quarters // 4) for quarters in ROW_QUARTERS]
    width = next((width for width in widths if width >= most), tokens)
    rows = np.full((len(mask), width), tokens, np.int32)
    for row, kept in zip(rows, flat, strict=True):
        found = np.flatnonzero(kept)
        row[: len(found)] = found
    return rows


def states_before(last: Array, hidden: Array, rows: Array) -> Array:
    """The states `[B, M, D]` that predict `rows`: a member's first token comes from the prefix's last state.

    Args:
      last: `[B, D]`, of the prefix's last token.
      hidden: `[B, G, R, D]`, of the member tokens.
      rows: int32 `[B, M]`, as `loss_rows` gives them.
    """
    first = (rows % hidden.shape[2] == 0)[..., None]
    return jnp.where(first, last[:, None], take_rows(hidden, jnp.maximum(rows - 1, 0)))


def take_rows(members: Array, rows: Array) -> Array:
    """`[B, M, ...]` of `members [B, G, R, ...]`; zeros where a row is none."""
    flat = members.reshape(members.shape[0], -1, *members.shape[3:])
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0, indices_are_sorted=True))(flat, rows)


def put_rows(values: Array, rows: Array, members: int, tokens: int) -> Array:
    """`values [B, M]` at their places in `[B, G, R]`; zeros elsewhere."""
    empty = jnp.zeros((members * tokens,), values.dtype)
    flat = jax.vmap(lambda x, i: empty.at[i].set(x, mode="drop", indices_are_sorted=True))(values, rows)
    return flat.reshape(-1, members, tokens)


# ---- the head ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logprobs(hidden: Array, table: Array, targets: Array, temperature: float, chunk: int) -> tuple[Array, Array]:
    """Log-probability of each target and entropy of its distribution, softmax(hidden . table / temperature).

    The products are in the dtype of `hidden`, to which the table is cast; their sums and everything after them are in
    fp32, and so are the sums of the gradients, over devices too. The backward pass computes the logits again: four
    products by the table where keeping the logits would take three. For a table that is not differentiated its part is
    not computed.

    Args:
      hidden: `[B, M, D]`, the states from which the targets are predicted.
      table: the parameter `[V, D]`, in its shards.
      targets: int32 `[B, M]`.
      temperature: the sampler's; both sides must divide by the same one.
      chunk: entries of the vocabulary (of each shard of it) whose logits exist at a time.

    Returns:
      fp32 `[B, M]` log-probabilities and entropies (nats).
    """
    return _forward(hidden, table, targets, temperature, chunk)[0]


def _forward(
    hidden: Array, table: Array, targets: Array, temperature: float, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """`token_logprobs`, and what its gradient needs: no array with an axis V but the table, in shards and gathered."""
    parameter, table = table, gather_over_fsdp(table.astype(hidden.dtype), TABLE_AXES)
    shards, states = _by_shard(hidden, table)

    def piece(carry: Moments, start: Array | int, size: int) -> Moments:
        logits = _logits(states, _cut(shards, start, size), temperature)
        most = jnp.max(logits, axis=-1)
        logits -= most[..., None]
        weights = jnp.exp(logits)
        found = most, jnp.sum(weights, axis=-1), jnp.sum(weights * logits, axis=-1)
        return _joined(*map(jnp.stack, zip(carry, found, strict=True)))

    zeros = jnp.zeros(states.shape[:2])
    none = jnp.full_like(zeros, jnp.finfo(jnp.float32).min), zeros, zeros
    most, total, weighted = _joined(*_over_pieces(piece, none, shards.shape[1], chunk))
    # As a difference of the normaliser and a mean logit, the entropy would lose the digits that these two share.
    normaliser, entropy = most + jnp.log(total), jnp.log(total) - weighted / total
    normaliser, entropy = normaliser.reshape(targets.shape), entropy.reshape(targets.shape)
    chosen = jnp.einsum("bmd,bmd->bm", hidden, table[targets], preferred_element_type=jnp.float32) / temperature
    return (chosen - normaliser, entropy), (hidden, parameter, table, targets, normaliser, entropy)


def _backward(
    temperature: float, chunk: int, saved: tuple[Array, ...], slopes: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    """Gradients of hidden states and table from those of log-probabilities and entropies `[B, M]`.

    With p the softmax of the logits and H its entropy, the log-probability of y has the slope 1[y] - p, and H has
    -p (log p + H).
    """
    hidden, parameter, table, *per_row = saved
    shards, states = _by_shard(hidden, table)
    targets, normaliser, entropy, for_logprob, for_entropy = (x.reshape(-1, 1) for x in (*per_row, *slopes))
    first = jnp.arange(len(shards))[:, None, None] * shards.shape[1]

    def piece(carry: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
        for_states, for_shards = carry
        rows = _cut(shards, start, size)
        logprobs = _logits(states, rows, temperature) - normaliser
        slope = jnp.where(first + start + jnp.arange(size) == targets, for_logprob, 0.0)
        slope -= jnp.exp(logprobs) * (for_logprob + for_entropy * (logprobs + entropy))
        slope = (slope / temperature).astype(hidden.dtype)
        for_states += jnp.einsum("snv,svd->snd", slope, rows, preferred_element_type=jnp.float32)
        # Summed over devices piece by piece: no device holds the gradient of the whole table.
        for_rows = sum_over_batch(_of_rows, (slope, states), (by_rows, by_rows), of_shards).astype(parameter.dtype)
        return for_states, jax.lax.dynamic_update_slice_in_dim(for_shards, for_rows, start, axis=1)

    vocab, embed = ShardingRules().spec(TABLE_AXES)
    by_rows, of_shards = PartitionSpec(vocab, BATCH_AXES), PartitionSpec(vocab, None, embed)
    # A sum for each shard of the vocabulary: those of states are added up over devices once, at the end.
    zeros = jnp.zeros(states.shape, jnp.float32), jnp.zeros(shards.shape, parameter.dtype)
    for_states, for_shards = _over_pieces(piece, zeros, shards.shape[1], chunk)
    for_hidden = jnp.sum(for_states, axis=0).astype(hidden.dtype)
    return for_hidden.reshape(hidden.shape), for_shards.reshape(parameter.shape), None


def _of_rows(slope: Array, states: Array) -> Array:
    """fp32 gradient `[S, v, D]` of rows of the table from `slope [S, B x M, v]`."""
    return jnp.einsum("snv,snd->svd", slope, states, preferred_element_type=jnp.float32)


token_logprobs.defvjp(_forward, _backward)


def _by_shard(hidden: Array, table: Array) -> tuple[Array, Array]:
    """The table `[S, V / S, D]` and the states `[S, B x M, D]`: one product per shard of the vocabulary.

    Pieces are cut from every shard at once, so that no part of the table moves. The product has two axes a side: with
    more, XLA transposes the table for it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else mesh.shape["tensor"]
    width = table.shape[-1]
    states = jnp.broadcast_to(hidden.reshape(1, -1, width), (count, hidden.size // width, width))
    return table.reshape(count, -1, width), states


def _cut(shards: Array, start: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(shards, start, size, axis=1)


def _logits(states: Array, rows: Array, temperature: float) -> Array:
    """fp32 `[S, B x M, v]` for `rows [S, v, D]` of the table."""
    return jnp.einsum("snd,svd->snv", states, rows, preferred_element_type=jnp.float32) / temperature


def _joined(most: Array, total: Array, weighted: Array) -> Moments:
    """The moments of disjoint sets of logits `[sets, ...]` together."""
    whole = jnp.max(most, axis=0)
    lower = most - whole
    scale = jnp.exp(lower)
    return whole, jnp.sum(scale * total, axis=0), jnp.sum(scale * (weighted + lower * total), axis=0)


def _over_pieces(step: Callable[[C, Array | int, int], C], carry: C, size: int, chunk: int) -> C:
    """`step(carry, start, length)` for what pieces of `chunk` entries leave of `size`, then for the pieces."""
    chunk = min(chunk, size)
    pieces, rest = divmod(size, chunk)
    if rest:  # in front: behind the loop, XLA would copy a carry as large as the table before writing to it
        carry = step(carry, 0, rest)
    return jax.lax.fori_loop(0, pieces, lambda i, c: step(c, rest + i * chunk, chunk), carry)
