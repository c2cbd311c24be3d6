"""Which groups of a batch are differentiated together: microbatches of static shape, on the host in numbers only.

Groups differ in length, and within a microbatch all are padded to the longest. So a microbatch is made of groups that
cost nearly the same *operations*: tokens would mislead, since a member's tokens go through the head and attend to the
whole prefix.
"""

import dataclasses
import functools
from collections.abc import Sequence

from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.flops import group_flops, root_flops
from maestro_jax.policy.preprocess import bucket


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Groups (their numbers in the batch, rising) in a static shape; what `size` has beyond them is padding."""

    groups: tuple[int, ...]
    size: int  # B
    prefix: int  # P
    room: int  # R

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, P and R: microbatches of one shape share a compiled program."""
        return self.size, self.prefix, self.room


@dataclasses.dataclass(frozen=True)
class Planner:
    """Splits batches into microbatches.

    None has more than groups / microbatches groups, and none is longer than the largest buckets: what fits into memory
    at that size always fits. Sizes are this largest one or halves of halves of it, and lengths are buckets, so that
    few shapes are compiled. Devices have equal work, as every microbatch spreads evenly over them.

    Attributes:
      root: P0, tokens; every device computes the root once a microbatch.
      members: G.
      groups: of a whole batch, as far as they are this process's: groups stay where their tokens are.
      microbatches: into at most so many a batch is split; must divide `groups`.
      shards: devices of this process that groups are spread over; must divide the largest one.
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
        """Numbers of groups that a microbatch may have, falling."""
        sizes = [self.groups // self.microbatches]
        while sizes[-1] % (2 * self.shards) == 0:
            sizes.append(sizes[-1] // 2)
        return tuple(sizes)

    def cost(self, size: int, prefix: int, room: int) -> int:
        """Operations of a forward pass over a microbatch on each device, but for the images."""
        return size // self.shards * self._group(prefix, room) + root_flops(self.architecture, self.root).total

    def padding(self, microbatches: Sequence[Microbatch], prefixes: Sequence[int], rooms: Sequence[int]) -> float:
        """Share of the operations that fills up the groups, of these lengths, that the microbatches were made for."""
        own = sum(self._group(*both) for both in zip(prefixes, rooms, strict=True))
        return 1.0 - own / sum(m.size * self._group(m.prefix, m.room) for m in microbatches)

    def rank(self, prefixes: Sequence[int], rooms: Sequence[int]) -> list[int]:
        """Groups of these lengths, the most expensive first: so that they match those of other processes."""
        lengths = [self._buckets(*both) for both in zip(prefixes, rooms, strict=True)]
        return sorted(range(len(lengths)), key=lambda g: (-self._group(*lengths[g]), g))

    def _group(self, prefix: int, room: int) -> int:
        return group_flops(self.architecture, self.root, prefix, self.members, room, images=0, patches=0).total

    def plan(self, prefixes: Sequence[int], rooms: Sequence[int]) -> list[Microbatch]:
        """The cheapest microbatches found, the most expensive first.

        Groups are sorted and the order is cut into microbatches. Where only one of the lengths differs, nothing is
        cheaper; where both do, both orders and that of the groups' costs are tried. The same lengths give the
        same plan.

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
        return min(plans, key=lambda plan: (sum(self.cost(*microbatch.shape) for microbatch in plan), len(plan)))

    def _buckets(self, prefix: int, room: int) -> tuple[int, int]:
        return (
            bucket(prefix, self.prefix_buckets, "a prompt", "raise config.policy.prefix_buckets"),
            bucket(room, self.member_buckets, "a member", "raise config.rollout.member_buckets"),
        )

    def _cut(self, order: Sequence[int], lengths: Sequence[tuple[int, int]]) -> list[Microbatch]:
        """The cheapest microbatches of consecutive groups (dynamic programming); fewer where the cost is equal."""

        @functools.cache
        def of(start: int, end: int) -> Microbatch:
            prefixes, rooms = zip(*(lengths[g] for g in order[start:end]), strict=True)
            size = min(size for size in self.sizes if size >= end - start)
            return Microbatch(tuple(sorted(order[start:end])), size, max(prefixes), max(rooms))

        @functools.cache
        def best(start: int, most: int) -> tuple[int, tuple[int, ...]]:
            """Cost of the groups from `start` on in at most `most` microbatches, and where these end."""
            if start == len(order):
                return 0, ()
            longest = min(start + self.sizes[0], len(order))
            # Those that are left must be enough for the groups that are left.
            shortest = max(start + 1, len(order) - (most - 1) * self.sizes[0])
            options = []
            for end in range(shortest, longest + 1):
                cost, ends = best(end, most - 1)
                options.append((self.cost(*of(start, end).shape) + cost, len(ends), (end, *ends)))
            cost, _, ends = min(options)
            return cost, ends

        ends = best(0, self.microbatches)[1]
        microbatches = [of(start, end) for start, end in zip((0, *ends), ends, strict=False)]
        return sorted(microbatches, key=lambda microbatch: (-self.cost(*microbatch.shape), microbatch.groups))
