"""Which groups of a batch are differentiated together: parts of static shape, on the host in numbers only.

Groups differ in length, and within a part all are padded to the longest. So parts are made of groups that cost nearly
the same *operations*: tokens would mislead, since a member's tokens go through the head and attend to the whole prefix.
"""

import dataclasses
import functools
from collections.abc import Sequence

from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.flops import group_flops, root_flops
from maestro_jax.policy.preprocess import bucket


@dataclasses.dataclass(frozen=True)
class Part:
    """Groups (their numbers in the batch, rising) in a static shape; what `size` has beyond them is padding."""

    groups: tuple[int, ...]
    size: int  # B
    prefix: int  # P
    room: int  # R

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, P and R: parts of one shape share a compiled program."""
        return self.size, self.prefix, self.room


@dataclasses.dataclass(frozen=True)
class Planner:
    """Splits batches into parts.

    No part has more groups than one microbatch, and none is longer than the largest buckets: what fits into memory at
    that size always fits. Sizes are a microbatch or halves of halves of it, and lengths are buckets, so that few
    shapes are compiled. Devices have equal work, as every part spreads evenly over them.

    Attributes:
      root: P0, tokens; every device computes the root once a part.
      members: G.
      groups: of a whole batch, as far as they are this process's: groups stay where their tokens are.
      microbatches: into at most so many parts a batch is split; must divide `groups`.
      shards: devices of this process that groups are spread over; must divide a microbatch.
    """

    architecture: PolicyArchitecture
    root: int
    members: int
    groups: int
    microbatches: int
    shards: int
    prefix_buckets: tuple[int, ...]
    member_buckets: tuple[int, ...]

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of groups that a part may have, falling."""
        sizes = [self.groups // self.microbatches]
        while sizes[-1] % (2 * self.shards) == 0:
            sizes.append(sizes[-1] // 2)
        return tuple(sizes)

    def cost(self, size: int, prefix: int, room: int) -> int:
        """Operations of a forward pass over a part on each device, but for the images."""
        return size // self.shards * self._group(prefix, room) + root_flops(self.architecture, self.root).total

    def padding(self, parts: Sequence[Part], prefixes: Sequence[int], rooms: Sequence[int]) -> float:
        """Share of the operations of `parts` that fills up the groups, of these lengths, that they were made for."""
        own = sum(self._group(*both) for both in zip(prefixes, rooms, strict=True))
        return 1.0 - own / sum(part.size * self._group(part.prefix, part.room) for part in parts)

    def rank(self, prefixes: Sequence[int], rooms: Sequence[int]) -> list[int]:
        """Groups of these lengths, the most expensive first: so that they match those of other processes."""
        lengths = [self._buckets(*both) for both in zip(prefixes, rooms, strict=True)]
        return sorted(range(len(lengths)), key=lambda g: (-self._group(*lengths[g]), g))

    def _group(self, prefix: int, room: int) -> int:
        return group_flops(self.architecture, self.root, prefix, self.members, room, images=0, patches=0).total

    def plan(self, prefixes: Sequence[int], rooms: Sequence[int]) -> list[Part]:
        """The cheapest parts found, the most expensive first.

        Groups are sorted and the order is cut into parts. Where only one of the lengths differs, nothing is cheaper;
        where both do, both orders and that of the groups' costs are tried. The same lengths give the same parts.

        Args:
          prefixes: tokens of each group's prefix.
          rooms: tokens of its longest member.

        Raises:
          DataError: a length beyond the largest bucket.
        """
        lengths = [self._buckets(*both) for both in zip(prefixes, rooms, strict=True)]
        by_cost = {both: self.cost(self.shards, *both) for both in lengths}
        orders = (lambda both: both, lambda both: both[::-1], lambda both: (by_cost[both], both))
        plans = [
            self._cut(sorted(range(len(lengths)), key=lambda g: (order(lengths[g]), g)), lengths) for order in orders
        ]
        return min(plans, key=lambda parts: (sum(self.cost(*part.shape) for part in parts), len(parts)))

    def _buckets(self, prefix: int, room: int) -> tuple[int, int]:
        return (
            bucket(prefix, self.prefix_buckets, "a prompt", "raise config.policy.prefix_buckets"),
            bucket(room, self.member_buckets, "a member", "raise config.rollout.member_buckets"),
        )

    def _cut(self, order: Sequence[int], lengths: Sequence[tuple[int, int]]) -> list[Part]:
        """The cheapest consecutive parts of an order of groups (dynamic programming); fewer where the cost is equal."""

        @functools.cache
        def part(start: int, end: int) -> Part:
            prefixes, rooms = zip(*(lengths[g] for g in order[start:end]), strict=True)
            size = min(size for size in self.sizes if size >= end - start)
            return Part(tuple(sorted(order[start:end])), size, max(prefixes), max(rooms))

        @functools.cache
        def best(start: int, parts: int) -> tuple[int, tuple[int, ...]]:
            """Cost of the groups from `start` on in at most `parts` parts, and where these end."""
            if start == len(order):
                return 0, ()
            longest = min(start + self.sizes[0], len(order))
            # The parts that are left must be enough for the groups that are left.
            shortest = max(start + 1, len(order) - (parts - 1) * self.sizes[0])
            options = []
            for end in range(shortest, longest + 1):
                cost, ends = best(end, parts - 1)
                options.append((self.cost(*part(start, end).shape) + cost, len(ends), (end, *ends)))
            cost, _, ends = min(options)
            return cost, ends

        ends = best(0, self.microbatches)[1]
        parts = [part(start, end) for start, end in zip((0, *ends), ends, strict=False)]
        return sorted(parts, key=lambda part: (-self.cost(*part.shape), part.groups))
