"""Who decodes next: the host's side of one shard's lanes, group slots and pages (no jax).

Lanes never wait: a lane whose trajectory waits for an expert goes to one that can decode, if there is any, and what
the first has computed is parked, on the device while pages last, then on the host while its budget lasts. If neither
does, the lane is held until the expert answers. Trajectories whose observation has come go first, then fresh ones in
the order of their groups.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maestro_jax.rollout.trajectory import GroupRecord, Parked, Stage, Trajectory


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one shard has, see `rollout/state.py: RolloutSizes`.

    Attributes:
      token_bytes: of one token's keys and values, over all layers.
      host_bytes: most bytes of parked ones on the host.
    """

    lanes: int
    groups: int
    members: int
    room: int
    pages: int
    page: int
    append_rows: int
    prefill_groups: int
    observation: int  # O, the longest observation
    token_bytes: int
    host_bytes: int


@dataclasses.dataclass(frozen=True)
class Orders:
    """What the device is to do with one shard before it decodes again; numpy, static shapes, no bools.

    Rows that order nothing name lane S; pages that are left out are page M. What fields mean stands in
    `rollout/moves.py` and `append_observations`. All are fields of one array, in which they travel.
    """

    packed: np.ndarray  # int32 [N]

    changed: np.ndarray  # int32 [S]
    status: np.ndarray  # int32 [S]
    member_slot: np.ndarray  # int32 [S]
    length: np.ndarray  # int32 [S]
    turn: np.ndarray  # int32 [S]
    keys: np.ndarray  # uint32 [S, 2]
    park_lanes: np.ndarray  # int32 [A]
    park_table: np.ndarray  # int32 [A, n]
    load_lanes: np.ndarray  # int32 [A]
    load_table: np.ndarray  # int32 [A, n]
    unload_lanes: np.ndarray  # int32 [A]
    back_lanes: np.ndarray  # int32 [A]
    append_lanes: np.ndarray  # int32 [A]
    observation: np.ndarray  # int32 [A, O]
    observation_length: np.ndarray  # int32 [A]
    slots: np.ndarray  # int32 [b]: of groups that are to be prefilled, B for none

    @classmethod
    def none(cls, capacity: Capacity) -> "Orders":
        """Orders that change nothing."""
        blank, fields = orders_layout(capacity)
        return cls.of(blank.copy(), fields)

    @classmethod
    def of(cls, packed: np.ndarray, fields: Mapping[str, "Field"]) -> "Orders":
        """Orders whose fields are views of the packed array."""
        return cls(
            packed, **{name: packed[p.start : p.end].reshape(p.shape).view(p.dtype) for name, p in fields.items()}
        )


class Field(NamedTuple):
    """Where a field of `Orders` stands in the packed array."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype


@functools.lru_cache(maxsize=64)
def orders_layout(c: Capacity) -> tuple[np.ndarray, dict[str, Field]]:
    """Packed orders that change nothing, and where each field stands in them."""
    lanes, rows, pages = (c.lanes,), (c.append_rows,), (c.append_rows, c.room // c.page)
    nobody, no_page = c.lanes, c.pages
    blank = {
        "changed": (lanes, 0),
        "status": (lanes, 0),
        "member_slot": (lanes, c.groups * c.members),
        "length": (lanes, 0),
        "turn": (lanes, 0),
        "keys": ((c.lanes, 2), 0),
        "park_lanes": (rows, nobody),
        "park_table": (pages, no_page),
        "load_lanes": (rows, nobody),
        "load_table": (pages, no_page),
        "unload_lanes": (rows, nobody),
        "back_lanes": (rows, nobody),
        "append_lanes": (rows, nobody),
        "observation": ((*rows, c.observation), 0),
        "observation_length": (rows, 0),
        "slots": ((c.prefill_groups,), c.groups),
    }
    fields, end = {}, 0
    for name, (shape, _) in blank.items():
        start, end = end, end + math.prod(shape)
        fields[name] = Field(start, end, shape, np.dtype(np.uint32 if name == "keys" else np.int32))
    return np.concatenate([np.full(math.prod(shape), value, np.int32) for shape, value in blank.values()]), fields


@functools.lru_cache(maxsize=64)
def _no_orders(capacity: Capacity) -> Orders:
    """Orders that change nothing, to be read only."""
    blank, fields = orders_layout(capacity)
    packed = blank.copy()
    packed.flags.writeable = False
    return Orders.of(packed, fields)


class Scheduler:
    """One shard's trajectories. `plan` is called between chunks; the caller holds a lock.

    Args:
      opening: what every trajectory reads before its first turn, where that does not stand in its prompt.
    """

    def __init__(self, capacity: Capacity, opening: Sequence[int] = ()):
        self.capacity = capacity
        self.opening = opening
        self.lanes: list[Trajectory | None] = [None] * capacity.lanes
        self.slots: list[GroupRecord | None] = [None] * capacity.groups
        self.queue: collections.deque[GroupRecord] = collections.deque()  # not admitted
        self.fresh: collections.deque[Trajectory] = collections.deque()  # of admitted groups
        self.returning: collections.deque[Trajectory] = collections.deque()  # parked, their observation has come
        self.free_pages = list(range(capacity.pages))
        self.host_bytes = 0
        self.finished: list[GroupRecord] = []  # not yet taken by the session
        self.in_order: collections.deque[GroupRecord] = collections.deque()  # from the first one that is not over
        self.leading = 0  # groups before that one
        self.oldest_allowed = -1  # version: groups admitted before it are overdue
        # What the engine has to carry for the orders that were given last.
        self.admitted: list[GroupRecord] = []
        self.unloaded: list[tuple[Parked, int]] = []  # where it goes, and how many tokens are of use
        self.brought_back: list[Trajectory] = []
        self._vacated: list[int] = []  # pages that are free once the orders have been carried out
        self._occupied: set[int] = set()  # lanes that decode somebody, as far as the device knows
        self._cleared_at_once = False  # whether lanes without a trajectory may still be decoding

    # ---- what happens to trajectories ----------------------------------------------------------------------

    def submit(self, group: GroupRecord) -> None:
        self.queue.append(group)
        self.in_order.append(group)

    def submit_again(self, group: GroupRecord) -> None:
        """Runs the members of a group that are not over, before all others that wait."""
        self.queue.appendleft(group)

    def ready(self, trajectory: Trajectory, observation: list[int]) -> None:
        """An observation has come, as ids."""
        trajectory.stage, trajectory.observation = Stage.READY, observation
        trajectory.timing.answered = time.monotonic()
        if trajectory.parked is not None:
            self.returning.append(trajectory)

    def finish(self, trajectory: Trajectory) -> None:
        """The episode is over; its lane, pages and, with its last member, its group's slot are free."""
        trajectory.finish()
        if trajectory in self.lanes:
            self.lanes[self.lanes.index(trajectory)] = None
        if trajectory.parked is not None:
            self._release(trajectory.parked)
            trajectory.parked = None
        group = trajectory.group
        if group is not None and group.finished:
            self.slots[group.slot] = None
            self.finished.append(group)
            while self.in_order and self.in_order[0].finished:
                self.in_order.popleft()
                self.leading += 1

    def abandon(self) -> None:
        """Ends and marks all that run, wherever they are."""
        for group in [slot for slot in self.slots if slot is not None]:
            for member in group.members:
                if not member.finished:
                    member.marked = True
                    self.finish(member)
        self.fresh.clear()
        self.returning.clear()
        # Whatever was being ordered when the fault happened: nobody is parked or given a lane now.
        self.free_pages, self._vacated, self.host_bytes = list(range(self.capacity.pages)), [], 0
        self._occupied, self._cleared_at_once = set(range(self.capacity.lanes)), True

    def stages(self) -> list[Stage | None]:
        """Of each lane's trajectory; None in an empty lane."""
        return [None if t is None else t.stage for t in self.lanes]

    @property
    def unfinished(self) -> int:
        """Groups that are not over."""
        return len(self.queue) + sum(slot is not None for slot in self.slots)

    @property
    def wants_lanes(self) -> bool:
        """Whether a trajectory or a group waits for room."""
        return bool(self.queue or self.fresh or self.returning)

    @property
    def overdue(self) -> int:
        """Running groups that began under a policy too old to be waited for any longer."""
        return sum(slot is not None and slot.version < self.oldest_allowed for slot in self.slots)

    @property
    def has_work(self) -> bool:
        """Whether something can be ordered without a further reply of an expert."""
        if any(t is not None and t.stage in (Stage.READY, Stage.DECODING) for t in self.lanes):
            return True
        return self._may_admit or self._may_seat

    # ---- orders ----------------------------------------------------------------------------------------------

    def plan(self, version: int) -> tuple[Orders, bool]:
        """Orders for the device, and whether more could be ordered at once than a program call takes."""
        self.free_pages += self._vacated
        self._vacated, self.unloaded, self.brought_back, self.admitted = [], [], [], []
        if not self.wants_lanes and not self._cleared_at_once and Stage.READY not in self.stages():
            return _no_orders(self.capacity), False  # most rounds, and the device waits for each
        orders = Orders.none(self.capacity)
        self._admit(orders, version)
        self._seat_returning(orders, self._append_in_place(orders))
        self._seat_fresh(orders)
        self._clear(orders)
        return orders, self._may_seat or Stage.READY in self.stages()

    def _clear(self, orders: Orders) -> None:
        """Empties lanes without a trajectory, together with the next assignment: until then they stand still anyway."""
        if orders.changed.any() or self._cleared_at_once:
            empty = {lane for lane in self._occupied if self.lanes[lane] is None}
            orders.changed[list(empty)] = 1  # member slot and status say already that they are empty
            self._occupied -= empty
            self._cleared_at_once = False

    @property
    def _may_admit(self) -> bool:
        """Whether a group can be prefilled; the later it is, the newer is the policy that does it."""
        return bool(self.queue) and None in self.slots and len(self.fresh) < self.capacity.lanes

    def _admit(self, orders: Orders, version: int) -> None:
        if not self._may_admit:
            return
        for slot, taken in enumerate(self.slots):
            if taken is not None or not self.queue or len(self.admitted) == self.capacity.prefill_groups:
                continue
            group = self.queue.popleft()
            group.slot = slot
            if not any(member.finished for member in group.members):  # those of a group that runs again keep their age
                group.version = version
            orders.slots[len(self.admitted)] = slot
            self.slots[slot] = group
            self.admitted.append(group)
            self.fresh.extend(member for member in group.members if not member.finished)

    def _append_in_place(self, orders: Orders) -> int:
        ready = [(lane, t) for lane, t in enumerate(self.lanes) if t is not None and t.stage is Stage.READY]
        chosen = ready[: self.capacity.append_rows]
        for row, (lane, trajectory) in enumerate(chosen):
            if trajectory.rewind is not None:  # a seat says how much of the cache counts, and leaves it as it is
                self._seat(orders, lane, trajectory, trajectory.rewind)
            self._append(orders, row, lane, trajectory)
        return len(chosen)

    def _append(self, orders: Orders, row: int, lane: int, trajectory: Trajectory) -> None:
        ids = [*trajectory.again, *trajectory.observation]
        start = trajectory.held if trajectory.rewind is None else trajectory.rewind
        orders.append_lanes[row], orders.observation_length[row] = lane, len(ids)
        orders.observation[row, : len(ids)] = ids
        trajectory.was_told(trajectory.observation)
        trajectory.dropped = len(trajectory.tokens) - (start + len(ids))
        trajectory.again, trajectory.rewind = [], None
        trajectory.observation, trajectory.stage = [], Stage.DECODING
        trajectory.timing.begun = time.monotonic()
        trajectory.timing.unread += trajectory.timing.begun - trajectory.timing.answered

    def _seat_returning(self, orders: Orders, rows: int) -> None:
        """Parked trajectories whose observation has come go back to a lane, which reads it."""
        while self.returning and rows < self.capacity.append_rows:
            lane = self._take_lane(orders)
            if lane is None:
                return
            trajectory = self.returning.popleft()
            parked = trajectory.parked
            assert parked is not None  # only parked ones are returning
            self._seat(orders, lane, trajectory, trajectory.held if trajectory.rewind is None else trajectory.rewind)
            if parked.pages:
                row = int(np.argmax(orders.load_lanes == self.capacity.lanes))
                orders.load_lanes[row] = lane
                orders.load_table[row, : len(parked.pages)] = parked.pages
                trajectory.parked = None
            else:  # the engine takes its rows from there
                orders.back_lanes[len(self.brought_back)] = lane
                self.brought_back.append(trajectory)
            self._release(parked)
            self._append(orders, rows, lane, trajectory)
            rows += 1

    def _seat_fresh(self, orders: Orders) -> None:
        while self.fresh and (lane := self._take_lane(orders)) is not None:
            trajectory = self.fresh.popleft()
            self._seat(orders, lane, trajectory, 0)
            trajectory.timing.assigned = trajectory.timing.begun = time.monotonic()
            if self.opening:
                trajectory.again = [*self.opening]
                self.ready(trajectory, [])
            else:
                trajectory.stage = Stage.DECODING

    def _seat(self, orders: Orders, lane: int, trajectory: Trajectory, length: int) -> None:
        group = trajectory.group
        assert group is not None
        self.lanes[lane] = trajectory
        self._occupied.add(lane)
        orders.changed[lane] = orders.status[lane] = 1
        orders.member_slot[lane] = group.slot * self.capacity.members + trajectory.member
        orders.length[lane] = length
        # An observation starts the next turn, and so does what opens the first thought.
        orders.turn[lane] = trajectory.turns - 1 if length or trajectory.turns or self.opening else 0
        orders.keys[lane] = trajectory.key

    @property
    def _may_seat(self) -> bool:
        """Whether a trajectory that could decode has no lane, and there is one to be had."""
        if not (self.returning or self.fresh):
            return False
        return None in self.lanes or any(self._may_vacate(t) for t in self.lanes if t is not None)

    def _take_lane(self, orders: Orders) -> int | None:
        """A free lane, if need be that of a trajectory that waits; None if there is neither."""
        if None in self.lanes:
            return self.lanes.index(None)
        for lane, trajectory in enumerate(self.lanes):
            if trajectory is not None and self._may_vacate(trajectory) and self._vacate(orders, lane, trajectory):
                return lane
        return None

    def _may_vacate(self, trajectory: Trajectory) -> bool:
        if trajectory.stage is not Stage.WAITING:
            return False
        needed = self._pages_of(trajectory)
        return (
            needed <= len(self.free_pages) or self.host_bytes + self._bytes_of(trajectory) <= self.capacity.host_bytes
        )

    def _vacate(self, orders: Orders, lane: int, trajectory: Trajectory) -> bool:
        """Parks what a lane holds; False if a program call takes no more of it."""
        c, needed = self.capacity, self._pages_of(trajectory)
        if needed <= len(self.free_pages):
            row = int(np.argmax(orders.park_lanes == c.lanes))
            if orders.park_lanes[row] != c.lanes:
                return False
            pages, self.free_pages = self.free_pages[:needed], self.free_pages[needed:]
            orders.park_lanes[row], orders.park_table[row, :needed] = lane, pages
            trajectory.parked = Parked(pages)
        else:
            if len(self.unloaded) == c.append_rows:
                return False
            orders.unload_lanes[len(self.unloaded)] = lane
            trajectory.parked = Parked([], size=self._bytes_of(trajectory))
            self.host_bytes += trajectory.parked.size
            # Not the trajectory: a reply may end it before the orders are carried out.
            self.unloaded.append((trajectory.parked, trajectory.held))
        self.lanes[lane] = None
        return True

    def _pages_of(self, trajectory: Trajectory) -> int:
        return -(-trajectory.held // self.capacity.page)

    def _bytes_of(self, trajectory: Trajectory) -> int:
        return trajectory.held * self.capacity.token_bytes

    def _release(self, parked: Parked) -> None:
        self._vacated += parked.pages
        self.host_bytes -= parked.size
