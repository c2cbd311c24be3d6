"""Episodes in flight: the loop of programs that serves them.

Exchange with the experts, carry out the orders (prefill, park, assign, load, append what experts said), decode a chunk.
The loop's conditions are replicated device values, so all processes enqueue the same programs in the same order.
"""

import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.parallel import preemption
from maestro_jax.parallel.sharding import over_groups
from maestro_jax.policy.attention.cascade import LaneKV
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.prompts import join_prompts
from maestro_jax.rollout.decode import StopTables
from maestro_jax.rollout.exchange import Counts, Exchange
from maestro_jax.rollout.moves import LaneStarts
from maestro_jax.rollout.programs import RolloutPrograms
from maestro_jax.rollout.scheduler import Capacity, Scheduler
from maestro_jax.rollout.state import Groups, Lanes, RolloutSizes
from maestro_jax.rollout.trajectory import GroupRecord, Stage, Trajectory
from maestro_jax.types import Task

Array = jax.Array
_SESSIONS = itertools.count()  # numbers of trajectories say which session they belong to


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What runs sessions of one size on one mesh."""

    mesh: Mesh
    sizes: RolloutSizes
    capacity: Capacity
    programs: RolloutPrograms
    exchange: Any  # (lanes, shard numbers) → (orders, counts)
    tables: StopTables
    root: Array  # int32 [P0], replicated
    shard_numbers: Array  # int32 [D], over the shards


class Session:
    """Groups may be submitted and the policy may change while others run; nothing is drained."""

    def __init__(self, compiled: Compiled, exchange: Exchange, local_shards: Sequence[int], greedy: bool):
        self.compiled = compiled
        self.exchange = exchange
        self.noise = np.float32(not greedy)
        self.schedulers = {shard: Scheduler(compiled.capacity, exchange.opening_thought) for shard in local_shards}
        self.submitted = 0  # groups
        self.version = -1
        self._held: tuple[Groups, Lanes, LaneKV] | None = None
        self._filler: tuple[PrefixBatch, int] | None = None  # a prompt for rows of a prefill that have none
        self._placed: Any = None  # how unloaded rows are spread over the devices
        self._number = next(_SESSIONS)

    def submit(
        self,
        tasks: Sequence[Task],
        prompts: PrefixBatch,
        keys: Sequence[Sequence[np.ndarray]],
        batch: int,
        only: Container[int] | None = None,
    ) -> list[GroupRecord]:
        """Queues groups of this process.

        Args:
          prompts: of these tasks, in their order (more may follow); numpy-valued, of the same sizes in all processes.
          keys: random key data uint32 `[2]` of each member of each task.
          batch: the tasks are the first of a batch of so many, which lie over the shards of this process in their
            order, as arrays do.
          only: which of the tasks are run; None runs all.
        """
        sizes, shards = self.compiled.sizes, list(self.schedulers)
        self._filler = (prompts, 0)
        records = []
        for row, (task, member_keys) in enumerate(zip(tasks, keys, strict=True)):
            if only is not None and row not in only:
                continue
            first = self._number << 32 | (self.submitted + row) * sizes.members
            members = [Trajectory(task, m, first + m, key) for m, key in enumerate(member_keys)]
            records.append(GroupRecord(task, self.submitted + row, members, prompt=(prompts, row)))
            records[-1].shard = shards[row * len(shards) // batch]
            self.schedulers[records[-1].shard].submit(records[-1])
        self.submitted += len(tasks)
        return records

    def again(self, records: Sequence[GroupRecord]) -> None:
        """Queues groups that are over once more: members that are marked begin anew, with their keys.

        What they were told since their first failure is void; what they were told before is not asked again.
        """
        for record in reversed(records):
            scheduler = self.schedulers[record.shard]
            scheduler.finished = [group for group in scheduler.finished if group is not record]
            if not record.marked:
                scheduler.finished.append(record)
                continue
            before = [member for member in record.members if member.marked]
            record.renew(self._number << 32 | self.submitted * self.compiled.sizes.members)
            self.submitted += 1
            for old in before:
                self.exchange.dispatcher.void(old.askers[len(record.members[old.member].kept) :])
            scheduler.submit_again(record)

    def take_finished(self, each: int) -> list[GroupRecord]:
        """The oldest `each` groups of every shard of this process that are over, shard by shard."""
        taken = []
        for _, scheduler in sorted(self.schedulers.items()):
            found = sorted(scheduler.finished, key=lambda group: (group.version, group.index))[:each]
            scheduler.finished = [group for group in scheduler.finished if group not in found]
            taken += found
        return taken

    def run(self, params: nnx.State, version: int, oldest_allowed: int = -1) -> Iterator[Counts]:
        """Runs what was submitted, one round of orders and decoding at a time, until all of it is over.

        Args:
          version: of the policy; recorded with every token.
          oldest_allowed: groups admitted under an earlier version are counted as overdue.

        Yields:
          The counts of each round, before it decodes. Whoever stops listening stops the run; a later one takes it up
          again, with another policy if need be.

        Raises:
          UserError: a call ended with it (`Dispatcher.check`).
        """
        mesh, programs = self.compiled.mesh, self.compiled.programs
        with jax.set_mesh(mesh):
            weights = programs.weights(params)
            if self._held is None:
                self._held = programs.open(params, self.compiled.root)
            elif version != self.version:
                groups, lanes, pages = self._held
                self._end_version(lanes)
                self._held = programs.with_root(params, groups, self.compiled.root), lanes, pages
        self.exchange.begin(self.schedulers, version)
        self.version = version
        for scheduler in self.schedulers.values():
            scheduler.oldest_allowed = oldest_allowed
        try:
            while True:
                with jax.set_mesh(mesh):
                    counts, self._held = self._round(params, weights, *self._held)
                if counts.stopped:
                    preemption.stop()
                self.exchange.dispatcher.check()
                if not counts.decoding:
                    self.exchange.catch_up()  # before the listener takes its time
                yield counts
                if not counts.unfinished:
                    return
                if counts.decoding and not counts.more:
                    groups, lanes, pages = self._held
                    with jax.set_mesh(mesh):
                        lanes = programs.decode(weights, groups, lanes, self.compiled.tables, self.noise)
                    self._held = groups, lanes, pages
                self._catch_up()
        finally:
            self.exchange.catch_up()

    def _catch_up(self) -> None:
        """What can be put off until the device has work again."""
        self.exchange.catch_up()
        for scheduler in self.schedulers.values():
            for group in scheduler.finished:
                group.arrays()  # makes them

    def _round(
        self, params: nnx.State, weights: Any, groups: Groups, lanes: Lanes, pages: LaneKV
    ) -> tuple[Counts, tuple[Groups, Lanes, LaneKV]]:
        """Exchanges with the experts and carries out the orders."""
        programs = self.compiled.programs
        orders, found = self.compiled.exchange(lanes, self.compiled.shard_numbers)
        counts = Counts(*np.asarray(found).tolist())
        if counts.admitted:
            groups = programs.prefill(params, groups, self._prompts(), orders.slots)
        if counts.parked:
            pages = programs.park(lanes, pages, orders.park_lanes, orders.park_table)
        if counts.unloaded:
            self._keep_on_host(programs.unload(lanes, orders.unload_lanes))
        if counts.reseated:
            lanes = programs.assign(groups, lanes, lane_starts(orders))
        if counts.loaded:
            lanes = programs.load(lanes, pages, orders.load_lanes, orders.load_table)
        if counts.brought_back:
            lanes = programs.bring_back(lanes, orders.back_lanes, self._from_host())
        if counts.appended:
            said = orders.observation, orders.observation_length
            lanes = programs.append(weights, groups, lanes, orders.append_lanes, *said)
        return counts, (groups, lanes, pages)

    def _end_version(self, lanes: Lanes) -> None:
        """Turns that are being written know which version wrote them so far."""
        for shard, scheduler in self.schedulers.items():
            written = rows_of_shard(lanes.written, shard)
            for lane, trajectory in enumerate(scheduler.lanes):
                if trajectory is not None and trajectory.stage is Stage.DECODING:
                    new = int(written[lane]) - len(trajectory.turn_versions)
                    trajectory.turn_versions += [self.version] * new

    def _prompts(self) -> PrefixBatch:
        """The prompts that this round's orders admit, on the mesh; rows without one get another's."""
        rows: list[Any] = []
        for _, scheduler in sorted(self.schedulers.items()):
            admitted = [record.prompt for record in scheduler.admitted]
            rows += [*admitted, *[self._filler] * (self.compiled.sizes.prefill_groups - len(admitted))]
        together = join_prompts(rows, None)
        over = over_groups(self.compiled.mesh)
        on_mesh = jax.tree.map(lambda x: jax.make_array_from_process_local_data(over, x), together)
        return dataclasses.replace(on_mesh, root=self.compiled.root)

    # ---- keys and values on the host ---------------------------------------------------------------------------

    def _keep_on_host(self, rows: LaneKV) -> None:
        """Brings unloaded keys and values `[D, A, K, R, H]` to the host, as far as they are used."""
        self._placed = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), rows)
        for shard, scheduler in self.schedulers.items():
            for leaf in jax.tree.leaves(rows) if scheduler.unloaded else ():
                whole = rows_of_shard(leaf, shard)
                for row, (parked, length) in enumerate(scheduler.unloaded):
                    parked.rows.append(whole[row, :, :length].copy())

    def _from_host(self) -> LaneKV:
        """The rows that this round's orders bring back, as `unload` gave them."""
        leaves, structure = jax.tree.flatten(self._placed, is_leaf=lambda x: isinstance(x, tuple))
        back = [self._leaf_from_host(i, *leaf) for i, leaf in enumerate(leaves)]
        for scheduler in self.schedulers.values():
            for trajectory in scheduler.brought_back:
                trajectory.parked = None
        return jax.tree.unflatten(structure, back)

    def _leaf_from_host(self, number: int, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # a sharded array has one for every device
            shards = range(*index[0].indices(shape[0]))
            whole = np.zeros((len(shards), *shape[1:]), dtype)
            for at, shard in enumerate(shards):
                for row, trajectory in enumerate(self.schedulers[shard].brought_back):
                    assert trajectory.parked is not None
                    kept = trajectory.parked.rows[number]
                    whole[at, row, :, : kept.shape[1]] = kept
            return whole[(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)


def rows_of_shard(x: Array, shard: int) -> np.ndarray:
    """`[A, ...]` of `x [D, A, ...]` on the host, put together from the devices of this process."""
    whole = np.zeros(x.shape[1:], x.dtype)
    for piece in x.addressable_shards:
        rows = range(*piece.index[0].indices(x.shape[0]))
        if shard in rows:
            whole[piece.index[1:]] = np.asarray(piece.data)[shard - rows.start]
    return whole


def lane_starts(orders: Any) -> LaneStarts:
    """The part of `Orders` (of arrays on the devices) that says which trajectory each lane decodes."""
    return LaneStarts(**{field.name: getattr(orders, field.name) for field in dataclasses.fields(LaneStarts)})
