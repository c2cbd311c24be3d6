"""The scheduler against a device of lists: whose tokens stand where, who decodes next, and that everybody ends."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_jax.rollout.scheduler import Capacity, Orders, Scheduler
from maestro_jax.rollout.state import Lane
from maestro_jax.rollout.trajectory import GroupRecord, Stage, Trajectory
from maestro_jax.types import Task

CHUNK = 3  # tokens a lane writes between two rounds
CAPACITY = Capacity(
    lanes=2,
    groups=2,
    members=3,
    room=24,
    pages=4,
    page=4,
    append_rows=2,
    prefill_groups=2,
    observation=3,
    token_bytes=10,
    host_bytes=0,
)


def group(index: int, members: int) -> GroupRecord:
    task = Task(f"toy/{index}", "how many?", (), ("4",), "toy")
    numbers = [index * members + m for m in range(members)]
    keys = [np.array([number, 7], np.uint32) for number in numbers]
    return GroupRecord(
        task, index, [Trajectory(task, m, n, k) for m, (n, k) in enumerate(zip(numbers, keys, strict=True))]
    )


def scheduler_of(submitted: int, **changed: Any) -> tuple[Scheduler, list[Trajectory]]:
    """A scheduler with so many groups in its queue, and their members."""
    made = Scheduler(dataclasses.replace(CAPACITY, **changed))
    records = [group(index, made.capacity.members) for index in range(submitted)]
    for record in records:
        made.submit(record)
    return made, [member for record in records for member in record.members]


def call_out(trajectory: Trajectory, tokens: int) -> None:
    """The trajectory has ended a turn of so many tokens with a call."""
    trajectory.wrote([trajectory.number] * tokens, [0.0] * tokens)
    trajectory.turns += 1
    trajectory.stage = Stage.WAITING


def rows(at: np.ndarray, lanes: int) -> list[int]:
    """The lanes that an order names."""
    return at[at < lanes].tolist()


# ---- one rule each -----------------------------------------------------------------------------------------


def test_lanes_are_filled_in_the_order_of_groups() -> None:
    scheduler, trajectories = scheduler_of(3, lanes=4)
    orders, more = scheduler.plan(version=5)
    assert scheduler.lanes == trajectories[:4] and not more
    assert orders.changed.tolist() == orders.status.tolist() == [1, 1, 1, 1]
    assert orders.member_slot.tolist() == [0, 1, 2, 3] and orders.slots.tolist() == [0, 1]
    assert orders.keys.tolist() == [[n, 7] for n in range(4)]
    assert not orders.length.any() and not orders.turn.any()
    assert [record.version for record in scheduler.admitted] == [5, 5] and scheduler.unfinished == 3


def test_a_lane_stays_with_who_waits_while_nobody_wants_it() -> None:
    scheduler, (first, second, third) = scheduler_of(1, lanes=3)
    scheduler.plan(0)
    call_out(second, 5)
    orders, more = scheduler.plan(0)
    assert scheduler.lanes == [first, second, third] and second.parked is None and not more
    assert not orders.changed.any()
    scheduler.ready(second, [8, 9])
    orders, _ = scheduler.plan(0)
    assert rows(orders.append_lanes, 3) == [1] and orders.observation[0].tolist() == [8, 9, 0]
    assert orders.observation_length.tolist() == [2, 0]
    assert second.stage is Stage.DECODING and second.tokens[-2:] == [8, 9] and second.authored[-3:] == [1, 0, 0]


def test_who_waits_is_parked_on_the_device_then_on_the_host_and_then_held() -> None:
    scheduler, trajectories = scheduler_of(2, lanes=3, pages=2, host_bytes=90, append_rows=3)
    scheduler.plan(0)
    for trajectory, tokens in zip(trajectories, (6, 8, 4), strict=False):
        call_out(trajectory, tokens)
    orders, more = scheduler.plan(0)
    on_device, on_host, held = trajectories[:3]
    assert on_device.parked.pages == [0, 1] and orders.park_table[0].tolist() == [0, 1, 2, 2, 2, 2]
    assert (on_host.parked.pages, on_host.parked.size, scheduler.host_bytes) == ([], 80, 80)
    assert scheduler.unloaded == [(on_host.parked, 8)] and held.parked is None
    assert rows(orders.park_lanes, 3) == [0] and rows(orders.unload_lanes, 3) == [1]
    assert scheduler.lanes == [trajectories[3], trajectories[4], held] and orders.changed.tolist() == [1, 1, 0]
    assert scheduler.free_pages == [] and not more and list(scheduler.fresh) == [trajectories[5]]


def test_a_reply_may_end_what_is_being_brought_to_the_host() -> None:
    """Another shard's callback takes replies for this one, between its plan and the loop that carries it out."""
    scheduler, (first, _) = scheduler_of(1, members=2, lanes=1, pages=0, host_bytes=100)
    scheduler.plan(0)
    call_out(first, 6)
    scheduler.plan(0)
    ((parked, length),) = scheduler.unloaded
    assert first.parked is parked and length == 6
    scheduler.finish(first)  # its observation had no room
    assert scheduler.unloaded == [(parked, 6)] and first.parked is None and scheduler.host_bytes == 0


def test_what_was_parked_comes_back_and_goes_on() -> None:
    scheduler, (first, second, third) = scheduler_of(1, lanes=1, pages=2, host_bytes=100)
    scheduler.plan(0)
    call_out(first, 6)
    scheduler.plan(0)
    call_out(second, 7)
    scheduler.plan(0)
    assert first.parked.pages == [0, 1] and second.parked.size == 70 and scheduler.lanes == [third]
    scheduler.ready(first, [9])
    scheduler.ready(second, [9])
    scheduler.finish(third)
    orders, _ = scheduler.plan(0)
    assert rows(orders.load_lanes, 1) == [0] and orders.load_table[0, :3].tolist() == [0, 1, 2]
    assert (orders.member_slot[0], orders.length[0], orders.turn[0], orders.keys[0, 0]) == (0, 6, 0, 0)
    assert rows(orders.append_lanes, 1) == [0] and scheduler.lanes == [first] and first.parked is None
    scheduler.finish(first)
    orders, _ = scheduler.plan(0)
    assert rows(orders.back_lanes, 1) == [0] and scheduler.brought_back == [second]
    assert (orders.member_slot[0], orders.length[0]) == (1, 7) and scheduler.host_bytes == 0


def test_pages_are_given_back_only_once_the_orders_are_carried_out() -> None:
    """Orders park before they load: a page that is being read may not be written in the same round."""
    scheduler, (first, second, third) = scheduler_of(1, lanes=1, pages=2)
    scheduler.plan(0)
    call_out(first, 8)
    scheduler.plan(0)
    call_out(second, 8)
    scheduler.ready(first, [9])
    scheduler.plan(0)  # the second cannot be parked while the first has all pages
    assert scheduler.lanes == [second] and list(scheduler.returning) == [first]
    scheduler.ready(second, [9])
    scheduler.plan(0)
    scheduler.finish(second)
    orders, _ = scheduler.plan(0)
    assert scheduler.lanes == [first] and rows(orders.load_lanes, 1) == [0] and scheduler.free_pages == []
    call_out(first, 1)
    orders, _ = scheduler.plan(0)
    assert scheduler.lanes == [third] or first.parked is None  # nine tokens need three pages
    assert sorted(scheduler.free_pages) == [0, 1]


def test_an_episode_that_ends_while_it_is_parked_gives_back_what_it_held() -> None:
    scheduler, (first, second, _) = scheduler_of(1, lanes=1, pages=2, host_bytes=100)
    scheduler.plan(0)
    call_out(first, 5)
    scheduler.plan(0)
    call_out(second, 5)
    scheduler.plan(0)
    scheduler.finish(first)
    scheduler.finish(second)
    scheduler.plan(0)
    assert sorted(scheduler.free_pages) == [0, 1] and scheduler.host_bytes == 0
    assert first.parked is None and second.parked is None


def test_a_program_call_appends_so_many_rows_and_more_are_asked_for() -> None:
    scheduler, trajectories = scheduler_of(1, lanes=3)
    scheduler.plan(0)
    for trajectory in trajectories:
        call_out(trajectory, 2)
        scheduler.ready(trajectory, [9])
    orders, more = scheduler.plan(0)
    assert rows(orders.append_lanes, 3) == [0, 1] and more
    orders, more = scheduler.plan(0)
    assert rows(orders.append_lanes, 3) == [2] and not more


def test_a_program_call_parks_so_many_lanes_and_more_are_asked_for() -> None:
    scheduler, trajectories = scheduler_of(2, lanes=3, append_rows=1)
    scheduler.plan(0)
    for trajectory in trajectories[:3]:
        call_out(trajectory, 2)
    seen = []
    for _ in range(3):
        orders, more = scheduler.plan(0)
        seen.append((rows(orders.park_lanes, 3), more))
    assert seen == [([0], True), ([1], True), ([2], False)]
    assert scheduler.lanes == trajectories[3:]


def test_who_cannot_get_a_lane_is_not_asked_for_again() -> None:
    scheduler, (first, second, third) = scheduler_of(1, lanes=2, append_rows=1)
    scheduler.plan(0)
    call_out(first, 2)
    scheduler.plan(0)
    scheduler.ready(first, [9])
    call_out(second, 2)
    scheduler.ready(second, [9])
    orders, more = scheduler.plan(0)  # the one row goes to a lane, and no lane is left for the other
    assert rows(orders.append_lanes, 2) == [1] and scheduler.lanes == [third, second]
    assert not more and list(scheduler.returning) == [first]


def test_who_has_been_answered_goes_before_who_has_not_begun() -> None:
    scheduler, trajectories = scheduler_of(2, lanes=2)
    scheduler.plan(0)
    first, second, third, fourth = trajectories[:4]
    call_out(first, 2)
    call_out(second, 2)
    scheduler.plan(0)
    assert scheduler.lanes == [third, fourth]
    scheduler.ready(second, [9])
    scheduler.ready(first, [9])
    scheduler.finish(third)
    scheduler.plan(0)
    assert scheduler.lanes == [second, fourth]  # in the order of the answers
    scheduler.finish(fourth)
    scheduler.plan(0)
    assert scheduler.lanes == [second, first] and list(scheduler.fresh) == trajectories[4:]


def test_a_slot_is_used_again_when_its_whole_group_is_over() -> None:
    scheduler, trajectories = scheduler_of(3, lanes=6, groups=2, prefill_groups=1)
    orders, _ = scheduler.plan(0)
    assert orders.slots.tolist() == [0] and not scheduler.finished
    orders, _ = scheduler.plan(0)
    assert orders.slots.tolist() == [1]
    for trajectory in trajectories[3:5]:
        scheduler.finish(trajectory)
    orders, _ = scheduler.plan(1)
    assert orders.slots.tolist() == [2] and not orders.changed.any()
    scheduler.finish(trajectories[5])
    orders, _ = scheduler.plan(1)
    assert orders.slots.tolist() == [1] and orders.member_slot.tolist()[3:] == [3, 4, 5]
    assert scheduler.finished == [trajectories[3].group] and scheduler.slots[1] is trajectories[6].group
    assert trajectories[6].group.version == 1 and scheduler.unfinished == 2


def test_lanes_of_who_is_over_are_emptied_with_the_next_seating() -> None:
    scheduler, trajectories = scheduler_of(2, lanes=3, groups=2, prefill_groups=1)
    scheduler.plan(0)
    scheduler.finish(trajectories[0])
    scheduler.finish(trajectories[2])
    orders, _ = scheduler.plan(0)
    assert orders.changed.tolist() == [1, 0, 1] and orders.member_slot.tolist() == [3, 6, 4]
    scheduler.finish(trajectories[1])
    orders, _ = scheduler.plan(0)
    assert orders.changed.tolist() == [0, 1, 0]
    for trajectory in trajectories[3:]:
        scheduler.finish(trajectory)
    orders, _ = scheduler.plan(0)
    assert not orders.changed.any()  # they stand still: no program is called for their sake


def test_what_is_abandoned_while_it_decodes_is_stopped_at_once() -> None:
    scheduler, trajectories = scheduler_of(2, lanes=3, groups=1, prefill_groups=1)
    scheduler.plan(0)
    scheduler.abandon()
    assert all(t.marked and t.finished for t in trajectories[:3]) and not trajectories[3].marked
    orders, _ = scheduler.plan(0)
    assert orders.changed.tolist() == [1, 1, 1] and orders.status.tolist() == [Lane.DECODING] * 3
    assert scheduler.lanes == trajectories[3:]
    scheduler.abandon()
    orders, _ = scheduler.plan(0)
    assert orders.changed.tolist() == [1, 1, 1] and orders.status.tolist() == [Lane.EMPTY] * 3


def test_orders_that_change_nothing_cannot_be_changed() -> None:
    """They are the same ones, round after round."""
    scheduler, (only,) = scheduler_of(1, members=1, lanes=1)
    scheduler.plan(0)
    orders, _ = scheduler.plan(0)
    with pytest.raises(ValueError, match="read-only"):
        orders.changed[0] = 1


def test_a_fault_amid_orders_leaves_no_page_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, (first, second) = scheduler_of(1, members=2, lanes=1, pages=0, host_bytes=100)
    scheduler.plan(0)
    call_out(first, 6)
    scheduler.plan(0)
    assert scheduler.host_bytes
    call_out(second, 2)
    scheduler.finish(second)
    scheduler.ready(first, [9])
    monkeypatch.setattr(scheduler, "_append", None)  # behind the release of what is brought back
    with pytest.raises(TypeError):
        scheduler.plan(0)
    scheduler.abandon()
    assert (scheduler.host_bytes, scheduler.unfinished) == (0, 0)
    orders, _ = scheduler.plan(0)
    assert orders.changed.tolist() == [1]


def test_there_is_work_while_anything_can_be_ordered() -> None:
    scheduler, (first, second, third) = scheduler_of(1, lanes=1, pages=1)
    assert scheduler.has_work  # a group to be admitted
    scheduler.plan(0)
    assert scheduler.has_work  # a lane decodes
    call_out(first, 3)
    assert scheduler.has_work  # its lane can be had
    scheduler.plan(0)
    call_out(second, 3)
    assert not scheduler.has_work  # no page for the second
    scheduler.ready(second, [9])
    assert scheduler.has_work
    scheduler.plan(0)
    for trajectory in (first, second, third):
        scheduler.finish(trajectory)
    scheduler.fresh.clear()
    assert not scheduler.has_work and not scheduler.unfinished


def test_a_group_that_no_lane_could_take_is_no_work() -> None:
    """An engine that holds its lanes would turn round and round instead of waiting for an expert."""
    scheduler, (first, second, *_) = scheduler_of(3, lanes=2, groups=2, prefill_groups=2, pages=0)
    scheduler.plan(0)
    call_out(first, 2)
    call_out(second, 2)
    assert scheduler.queue and len(scheduler.fresh) == 4
    scheduler.slots[1] = None
    assert not scheduler.has_work
    orders, more = scheduler.plan(0)
    assert not scheduler.admitted and not more


# ---- whole sessions ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a scripted episode, and what follows it; behind the last one the episode ends."""

    tokens: int
    rounds: int  # until the expert has answered
    reply: int  # tokens of the observation; 0: there is no room for it, and the episode ends


class Device:
    """Lanes and pages that hold tokens in place of keys and values; orders in the order of `Session._round`."""

    def __init__(self, capacity: Capacity):
        self.capacity = capacity
        self.groups: list[GroupRecord | None] = [None] * capacity.groups
        self.decoding: list[Trajectory | None] = [None] * capacity.lanes
        self.status = [Lane.EMPTY] * capacity.lanes
        self.turn = [0] * capacity.lanes
        self.member_slot = [capacity.groups * capacity.members] * capacity.lanes
        self.cache: list[list[int]] = [[] for _ in range(capacity.lanes)]
        self.pages: list[list[int]] = [[] for _ in range(capacity.pages)]

    def carry_out(self, orders: Orders, scheduler: Scheduler) -> None:
        lanes, admitted = self.capacity.lanes, scheduler.admitted
        for slot, record in zip(rows(orders.slots, self.capacity.groups), admitted, strict=True):
            self.groups[slot] = record
        for lane, table in zip(orders.park_lanes, orders.park_table, strict=True):
            if lane < lanes:
                assert self.status[lane] is not Lane.DECODING
                for part, page in enumerate(rows(table, self.capacity.pages)):
                    self.pages[page] = self.cache[lane][part * self.capacity.page : (part + 1) * self.capacity.page]
        for lane, (parked, length) in zip(rows(orders.unload_lanes, lanes), scheduler.unloaded, strict=True):
            parked.rows = self.cache[lane][:length]
        self._seat(orders)
        for lane, table in zip(orders.load_lanes, orders.load_table, strict=True):
            if lane < lanes:
                self.cache[lane] = [token for page in rows(table, self.capacity.pages) for token in self.pages[page]]
        for lane, trajectory in zip(rows(orders.back_lanes, lanes), scheduler.brought_back, strict=True):
            self.cache[lane], trajectory.parked = trajectory.parked.rows, None
        for lane, ids, n in zip(orders.append_lanes, orders.observation, orders.observation_length, strict=True):
            if lane < lanes:
                self.cache[lane] = self.cache[lane] + ids[:n].tolist()
                self.turn[lane], self.status[lane] = self.turn[lane] + 1, Lane.DECODING

    def _seat(self, orders: Orders) -> None:
        members = self.capacity.members
        for lane in np.flatnonzero(orders.changed):
            self.status[lane], self.turn[lane] = Lane(orders.status[lane]), int(orders.turn[lane])
            self.member_slot[lane] = int(orders.member_slot[lane])
            self.cache[lane], self.decoding[lane] = [], None
            if orders.status[lane] == Lane.DECODING:
                record = self.groups[orders.member_slot[lane] // members]
                self.decoding[lane] = record.members[orders.member_slot[lane] % members]
                assert orders.keys[lane].tolist() == self.decoding[lane].key.tolist()
        taken = [slot for slot in self.member_slot if slot < self.capacity.groups * members]
        assert len(set(taken)) == len(taken)  # two lanes for a member would overwrite each other's queries


class Session:
    """Plays experts and decoding by scripts until every episode is over, and looks at everything on the way."""

    def __init__(self, capacity: Capacity, scripts: Sequence[Sequence[Sequence[Turn]]], submitted: Sequence[int]):
        self.scheduler, self.device = Scheduler(capacity), Device(capacity)
        self.records = [group(index, capacity.members) for index in range(len(scripts))]
        self.scripts = {
            member: list(script)
            for record, members in zip(self.records, scripts, strict=True)
            for member, script in zip(record.members, members, strict=True)
        }
        self.arrivals = sorted(zip(submitted, range(len(scripts)), strict=True))
        self.answers: list[tuple[int, Trajectory, int]] = []  # round, who is answered, tokens

    def run(self) -> None:
        turns = [turn for script in self.scripts.values() for turn in script]
        # As if one trajectory after the other did everything alone.
        most = max(at for at, _ in self.arrivals) + sum(t.tokens // CHUNK + t.rounds + 4 for t in turns) + 2
        for number in range(most):
            while self.arrivals and self.arrivals[0][0] <= number:
                self.scheduler.submit(self.records[self.arrivals.pop(0)[1]])
            self._answer(number)
            orders, more = self.scheduler.plan(version=number)
            self.device.carry_out(orders, self.scheduler)
            self.check(more)
            if not self.arrivals and not self.scheduler.unfinished:
                break
            if not more:
                self._decode(number)
        assert all(member.finished for record in self.records for member in record.members), "somebody starved"

    def _answer(self, number: int) -> None:
        due = [answer for answer in self.answers if answer[0] <= number]
        self.answers = [answer for answer in self.answers if answer[0] > number]
        for _, trajectory, reply in due:
            if reply:
                self.scheduler.ready(trajectory, [-trajectory.number - 1] * reply)
            else:
                self.scheduler.finish(trajectory)

    def _decode(self, number: int) -> None:
        for lane, trajectory in enumerate(self.device.decoding):
            if self.device.status[lane] is not Lane.DECODING:
                continue
            cache, turn = self.device.cache[lane], self.scripts[trajectory][self.device.turn[lane]]
            written = len(cache) - len(trajectory.tokens)
            now = min(CHUNK, turn.tokens - written)
            cache += [1000 * trajectory.number + len(cache) + i for i in range(now)]
            if written + now == turn.tokens:
                self.device.status[lane] = Lane.STOPPED
                self._end_turn(number, trajectory, cache[len(trajectory.tokens) :], turn)

    def _end_turn(self, number: int, trajectory: Trajectory, tokens: list[int], turn: Turn) -> None:
        trajectory.wrote(tokens, [0.0] * len(tokens))
        trajectory.turns += 1
        if trajectory.turns == len(self.scripts[trajectory]):
            self.scheduler.finish(trajectory)
        else:
            trajectory.stage = Stage.WAITING
            self.answers.append((number + 1 + turn.rounds, trajectory, turn.reply))

    def check(self, more: bool) -> None:
        c, scheduler, device = self.scheduler.capacity, self.scheduler, self.device
        in_lanes = [t for t in scheduler.lanes if t is not None]
        parked = [t for t in self.scripts if t.parked is not None]
        assert len(set(in_lanes)) == len(in_lanes) and not set(in_lanes) & set(parked)
        held = [page for t in parked for page in t.parked.pages]
        assert len({*held, *scheduler.free_pages}) == len(held) + len(scheduler.free_pages) <= c.pages
        assert scheduler.host_bytes == sum(t.parked.size for t in parked) <= c.host_bytes
        for lane, trajectory in enumerate(scheduler.lanes):
            decodes = trajectory is not None and trajectory.stage is Stage.DECODING
            assert (device.status[lane] is Lane.DECODING) == decodes
            if trajectory is None:
                continue  # its last trajectory stands still in it, until lanes are assigned the next time
            assert device.decoding[lane] is trajectory
            # Its own tokens, all of them; those of a turn that goes on come on top.
            assert device.cache[lane][: len(trajectory.tokens)] == trajectory.tokens
            assert device.turn[lane] == trajectory.turns - (trajectory.stage is not Stage.DECODING)
        if not more and (scheduler.fresh or scheduler.returning):
            # Nobody who could decode is without a lane while one can be had.
            for trajectory in scheduler.lanes:
                assert trajectory is not None and trajectory.stage in (Stage.DECODING, Stage.WAITING)
                if trajectory.stage is Stage.WAITING:
                    assert -(-len(trajectory.tokens) // c.page) > len(scheduler.free_pages)
                    assert len(trajectory.tokens) * c.token_bytes + scheduler.host_bytes > c.host_bytes


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Capacity, list[list[list[Turn]]], list[int]]:
    lanes, groups, members = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    capacity = Capacity(
        lanes=lanes,
        groups=groups,
        members=members,
        room=24,
        pages=draw(st.integers(0, 10)),
        page=draw(st.sampled_from([2, 4, 12])),
        append_rows=draw(st.integers(1, lanes)),
        prefill_groups=draw(st.integers(1, groups)),
        observation=3,
        token_bytes=10,
        host_bytes=draw(st.sampled_from([0, 60, 250, 10_000])),
    )
    turn = st.builds(Turn, st.integers(1, 6), st.integers(0, 9), st.sampled_from([0, 1, 2, 3, 3]))
    script = st.lists(turn, min_size=1, max_size=3)
    number = draw(st.integers(1, 6))
    scripts = draw(st.lists(st.lists(script, min_size=members, max_size=members), min_size=number, max_size=number))
    return capacity, scripts, draw(st.lists(st.integers(0, 12), min_size=number, max_size=number))


@settings(max_examples=300, deadline=None)
@given(drawn=sessions())
def test_every_episode_ends_with_its_own_tokens_and_nothing_is_lost(
    drawn: tuple[Capacity, list[list[list[Turn]]], list[int]],
) -> None:
    session = Session(*drawn)
    session.run()
    scheduler = session.scheduler
    for member, script in session.scripts.items():
        played = next((n for n, turn in enumerate(script[:-1], 1) if not turn.reply), len(script))
        assert (member.turns, member.parked) == (played, None)
        assert sum(member.authored) == sum(turn.tokens for turn in script[:played])
        assert len(member.tokens) == sum(member.authored) + sum(turn.reply for turn in script[: played - 1])
    assert sorted(record.index for record in scheduler.finished) == list(range(len(session.records)))
    orders, more = scheduler.plan(0)
    assert not more and not scheduler.has_work and not orders.changed.any()
    assert sorted(scheduler.free_pages) == list(range(scheduler.capacity.pages))
    assert scheduler.host_bytes == 0
    assert scheduler.lanes == [None] * scheduler.capacity.lanes
    assert scheduler.slots == [None] * scheduler.capacity.groups
