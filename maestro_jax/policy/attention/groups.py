"""How the tokens of a group stand in one row: its prefix, then its members one after the other.

One row a group keeps projections, norms and MLP plain matmuls over all tokens; only attention and the
loss know which token belongs to whom.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maestro_jax.policy.attention.merge import Part

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """A row of `prefix + members * room` tokens; `members` may be 0 (a prompt whose members are yet to come)."""

    prefix: int  # P
    members: int  # G
    room: int  # R

    @property
    def length(self) -> int:
        """T, tokens of a row."""
        return self.prefix + self.members * self.room

    def join(self, prefix: Array, members: Array) -> Array:
        """`[B, P, ...]` and `[B, G, R, ...]` → `[B, T, ...]`."""
        rows = members.reshape(members.shape[0], self.members * self.room, *members.shape[3:])
        return jnp.concatenate([prefix, rows], axis=1)

    def of_members(self, row: Array) -> Array:
        """`[B, T, ...]` → its members `[B, G, R, ...]`."""
        return row[:, self.prefix :].reshape(row.shape[0], self.members, self.room, *row.shape[2:])

    def parts(self, before: int) -> tuple[Part, ...]:
        """What a row attends to, behind `before` keys that everybody sees."""
        end, prefix = before + self.length, before + self.prefix
        parts = (Part((0, self.prefix), (0, prefix), causal=True),)
        if not self.members:
            return parts
        members = (self.prefix, self.length)
        own = Part(members, (prefix, end), causal=True, sequences=self.members)
        return (*parts, Part(members, (0, prefix)), own)

    def sees(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Whether the token at `query` of a row may see the one at `key`, all of them real; broadcasts."""
        member_of_query, member_of_key = ((i - self.prefix) // max(self.room, 1) for i in (query, key))
        same = (key < self.prefix) | (member_of_query == member_of_key)
        return same & (key <= query)


def causal(length: int) -> GroupLayout:
    """One sequence and nothing on top of it."""
    return GroupLayout(length, 0, 0)
