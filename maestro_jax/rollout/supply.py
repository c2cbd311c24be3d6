"""Finished groups for every step of training, in the rollouts in which the update takes them.

On-policy, a step's groups are those of its own tasks; in several rollouts, they come in the order of the tasks while
others still run, so that gradients fill the time in which experts work. With `refill`, further tasks take the place of
those whose groups have no contrast (dynamic sampling: DAPO, Yu et al. 2025, arXiv 2503.14476). With `ahead`, tasks of
later steps are under way as well: a step takes the groups that are over, oldest first, the others go on under the
next policy, and none is dropped.

Where experts fail more often than `Outages` tolerates, the step waits, and its marked episodes are run again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from maestro_jax import failpoints
from maestro_jax.data.order import merge_states
from maestro_jax.errors import ConfigError
from maestro_jax.parallel import cluster
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.prompts import PreparedTask, join_prompts, take_prompts
from maestro_jax.rollout.engine import Engine, Rollout, assemble, lane_key, marks_of
from maestro_jax.rollout.outages import Marks, Outages
from maestro_jax.rollout.session import Session
from maestro_jax.rollout.trajectory import GroupRecord
from maestro_jax.types import Task


@dataclasses.dataclass(frozen=True)
class SupplyConfig:
    """How steps get their groups.

    Attributes:
      groups: of a step.
      members: of a group.
      rollouts_per_step: in how many a step's groups come; more than one only where `ahead` is 0.
      ahead: batches of tasks that are under way besides the step's own.
      staleness: a group is trained at most so many versions after its episodes began.
      refill: at most `refill` x `groups` further tasks of a step replace groups without contrast; only where
        `rollouts_per_step` is 1 and `ahead` is 0.
    """

    groups: int
    members: int
    rollouts_per_step: int
    ahead: int
    staleness: int
    refill: int = 0


class TaskBatches(Protocol):
    """A resumable stream of batches of tasks, prepared (`Prompts.prepare`)."""

    def __next__(self) -> Sequence[PreparedTask]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass
class Pulled:
    """This process's part of a batch of tasks that some process has not yet trained as a whole.

    A group that another has taken the place of counts as trained.
    """

    data: dict[str, Any]  # state of this process's data before it was pulled
    left: set[int]  # rows of groups that are not yet trained


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A task that was pulled and not yet run."""

    batch: int  # that it was pulled with; its randomness is keyed by it
    row: int
    prepared: PreparedTask


class Supply:
    """Pulls tasks and runs their episodes, step by step; of several processes, each those of its own tasks.

    Args:
      batches: of this process's part of `config.groups` tasks each.
      outages: what to do about marked episodes; None trains without them, however many they are.
      contrast: `rollout → bool [B]`, which groups would move the policy; needed for `refill` only.

    Attributes:
      marked: expert → share of the last step's episodes that it failed, those among them that were run again.
    """

    def __init__(
        self,
        engine: Engine,
        batches: TaskBatches,
        config: SupplyConfig,
        seed: int,
        outages: Outages | None = None,
        contrast: Callable[[Rollout], np.ndarray] | None = None,
    ):
        self.engine = engine
        self.batches = batches
        self.config = config
        self.seed = seed
        self.outages = outages
        self.contrast = contrast
        self.marked: dict[str, float] = {}
        self.pulled: dict[int, Pulled] = {}  # by the step that its randomness is keyed by
        self.next_step = 1  # the number of the next batch; with `refill`, a step may pull several
        self._waiting: list[Waiting] = []  # in the order of the data
        self.session: Session | None = None  # of episodes that outlive a step
        self._origin: dict[GroupRecord, tuple[int, int]] = {}  # step and row
        self._done_before: dict[int, set[int]] = {}  # rows trained before the run was interrupted, by step
        self._share = config.groups // jax.process_count()  # of every batch, this process's
        self._first_row = jax.process_index() * self._share  # of this process in every batch
        # What groups in the middle of a batch are bound to: their process and, while they run, their shard.
        self._layout = [jax.process_count(), batch_shards(engine.mesh) if config.ahead else 1]

    def get_state(self) -> dict[str, Any]:
        """JSON-able: where the data goes on, and what of it is trained already. All processes ask, and get the same."""
        own = [(step, self._first_row + row) for step, batch in self.pulled.items() for row in batch.left]
        left = {(step, row) for process in cluster.gather(own) for step, row in process}
        first = min((step for step, _ in left), default=self.next_step)
        self.pulled = {step: batch for step, batch in self.pulled.items() if step >= first}
        data = self.pulled[first].data if self.pulled else self.batches.get_state()
        steps, rows = range(first, self.next_step), range(self.config.groups)
        done = {str(step): [row for row in rows if (step, row) not in left] for step in steps}
        merged = merge_states(cluster.gather(data))
        return {"data": merged, "next_step": first, "done": done, "layout": self._layout}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on there. Groups that were under way begin again, with the same random keys.

        Raises:
          ConfigError: they would not lie evenly over other processes or shards.
        """
        layout = state.get("layout", self._layout)  # older versions saved none
        if any(state["done"].values()) and layout != self._layout:
            raise ConfigError(
                f"the run is in the middle of a batch of tasks, on {layout[0]} processes and {layout[1]} batch shards "
                f"(mesh axes data x fsdp), this start has {self._layout[0]} and {self._layout[1]}; start as many again"
            )
        self.batches.set_state(state["data"])
        self.next_step = state["next_step"]
        self._done_before = {int(step): set(rows) for step, rows in state["done"].items()}

    def step(self, params: nnx.State, step: int) -> Iterator[Rollout]:
        """The groups of a step; the policy is the same for all of them."""
        self.marked = {}
        if self.config.ahead:
            yield self._oldest(params, step)
        elif self.config.refill:
            yield self._refilled(params, step)
        else:
            yield from self._own(params, step)
        failpoints.reach("after_rollout")

    def _own(self, params: nnx.State, step: int) -> Iterator[Rollout]:
        """On-policy: the step's own tasks."""
        config, engine = self.config, self.engine
        tasks, prompts = self._next_batch()
        self.next_step = step + 1
        session = engine.session(params, config.groups, config.members, prompts.tokens.shape[1], greedy=False)
        records = session.submit(tasks, prompts, self._keys(tasks, step), len(tasks))
        given = 0
        while True:
            held = config.rollouts_per_step == 1
            for counts in session.run(params, version=step):
                self._place_in_rollout()
                ready = counts.leading * config.rollouts_per_step // session.compiled.sizes.groups
                # Gradients are taken where the devices would be idle.
                while given < ready and not held and (not counts.decoding or not counts.unfinished):
                    if held := not self._is_clean(records, session, given):
                        break  # what is marked may be run again, once it is known how much of the step is
                    yield self._rollout(records, prompts, session, given)
                    given += 1
                engine.exchange.patient = held or ready <= given
            if self._tolerates(marks_of(records), step):
                break
            session.again(records)
        for number in range(given, config.rollouts_per_step):
            yield self._rollout(records, prompts, session, number)

    def _is_clean(self, records: Sequence[GroupRecord], session: Session, number: int) -> bool:
        """Whether rollout `number` is over without a marked episode, in all processes."""
        own = [records[row] for row in self._rows(session, number)]
        return self.outages is None or all(cluster.gather(all(one.finished and not one.marked for one in own)))

    def _tolerates(self, marks: Marks, step: int) -> bool:
        """Whether the step is trained as it is; if not, its experts have been waited for."""
        if self.outages is None:
            return True
        for name, share in marks.shares.items():
            self.marked[name] = max(share, self.marked.get(name, 0.0))
        return self.outages.tolerates(marks, f"the episodes of step {step}")

    def _rows(self, session: Session, number: int) -> list[int]:
        """Of the groups of rollout `number`: as many of each shard, so that none moves."""
        sizes, shards = session.compiled.sizes, len(session.schedulers)
        each = sizes.groups // self.config.rollouts_per_step
        return [s * sizes.groups + number * each + i for s in range(shards) for i in range(each)]

    def _rollout(self, records: Sequence[GroupRecord], prompts: PrefixBatch, session: Session, number: int) -> Rollout:
        sizes, rows = session.compiled.sizes, self._rows(session, number)
        taken = take_prompts(prompts, np.array(rows), prompts.tokens.shape[1])
        return assemble([records[row] for row in rows], taken, len(rows), self.config.members, sizes.room)

    # ---- with further tasks in the place of those without contrast ---------------------------------------------

    def _refilled(self, params: nnx.State, step: int) -> Rollout:
        """On-policy: this process's next tasks, as many as it takes for a part of a batch with contrast.

        What a step takes is the shortest stretch of the data in which enough groups have contrast (the cap aside). So
        it depends on rewards alone, not on who answers first. Rounds only say how much of the stretch is certain.
        """
        assert self.contrast is not None  # or nobody could say what to replace
        tasks: list[Waiting] = []
        records: list[GroupRecord] = []
        contrast: list[bool] = []
        marks, wanted = Marks(), self._share
        while any(cluster.gather(wanted)):
            new = self._next_tasks(wanted)
            found, rollout, marks = self._round(params, new, tasks, marks, step)
            contrast += self.contrast(rollout)[: len(new)].tolist()
            tasks, records = tasks + new, records + found
            wanted = min(self._share - sum(contrast), self._share * (1 + self.config.refill) - len(tasks))
        # A group is left out only where another has taken its place: where the cap is met, the first ones stay.
        ranked = sorted(range(len(tasks)), key=lambda number: (not contrast[number], number))
        kept, left_out = sorted(ranked[: self._share]), sorted(ranked[self._share :])
        rollout = self._assembled([records[n] for n in kept], [tasks[n] for n in kept])
        refilled = sum(number >= self._share for number in kept)
        return dataclasses.replace(rollout, refilled=refilled, replaced=[records[n].members for n in left_out])

    def _next_tasks(self, wanted: int) -> list[Waiting]:
        """The next ones of this process; all ask at once, and pull at once, so that they agree on where the data is."""
        while any(cluster.gather(len(self._waiting) < wanted)):
            batch, data = self.next_step, self.batches.get_state()
            prepared = self._pull_batch()
            self.next_step += 1
            done = self._done_before.pop(batch, set())
            left = {row for row in range(len(prepared)) if self._first_row + row not in done}
            self.pulled[batch] = Pulled(data, left)
            self._waiting += [Waiting(batch, row, prepared[row]) for row in sorted(left)]
        taken, self._waiting = self._waiting[:wanted], self._waiting[wanted:]
        for one in taken:
            self.pulled[one.batch].left.discard(one.row)
        return taken

    def _round(
        self, params: nnx.State, new: Sequence[Waiting], before: Sequence[Waiting], marks: Marks, step: int
    ) -> tuple[list[GroupRecord], Rollout, Marks]:
        """Runs tasks to their end; another process may have some where this one has none.

        Args:
          before, marks: the step's tasks of earlier rounds, and of how many of all processes' episodes failures got in
            the way.

        Returns:
          Their groups, the same as arrays, and the marks of the step so far.
        """
        config, engine = self.config, self.engine
        prompts = engine.prompts.collate([one.prepared for one in new or before[:1]], agree=cluster.most)
        session = engine.session(params, config.groups, config.members, prompts.tokens.shape[1], greedy=False)
        keys = [key for one in new for key in self._keys([one.prepared.task], one.batch)]
        records = session.submit([one.prepared.task for one in new], prompts, keys, max(len(new), 1))
        while True:
            for _ in session.run(params, version=step):
                self._place_in_rollout()
            # The share that is tolerated is one of the step: a round of one task has few episodes.
            so_far = marks + marks_of(records)
            if self._tolerates(so_far, step):
                break
            session.again(records)
        return records, assemble(records, prompts, len(prompts.tokens), config.members, engine.config.room), so_far

    def _assembled(self, records: Sequence[GroupRecord], tasks: Sequence[Waiting]) -> Rollout:
        """Groups of several rounds: each had prompts of its own width."""
        prompts = self.engine.prompts.collate([one.prepared for one in tasks], agree=cluster.most)
        return assemble(records, prompts, len(records), self.config.members, self.engine.config.room)

    # ---- with tasks of later steps under way -------------------------------------------------------------------

    def _oldest(self, params: nnx.State, step: int) -> Rollout:
        """Groups that are over, oldest first, while tasks of later steps are under way."""
        config, engine = self.config, self.engine
        if self.session is None:
            width = max(engine.prompts.config.prefix_buckets)
            under_way = config.groups * (1 + config.ahead)
            self.session = engine.session(params, under_way, config.members, width, greedy=False)
        while self.next_step <= step + config.ahead:
            self._pull(self.session)
        each = config.groups // self.session.compiled.sizes.shards
        while True:
            for counts in self.session.run(params, step, oldest_allowed=step - config.staleness + 1):
                self._place_in_rollout()
                if counts.finished >= each and not counts.overdue:
                    break
            taken = self.session.take_finished(each)
            if self._tolerates(marks_of(taken), step):
                break
            self.session.again(taken)
        for record in taken:
            self._trained(record)
        prompts = join_prompts([record.prompt for record in taken], engine.prompts.root)
        return assemble(taken, prompts, len(taken), config.members, self.session.compiled.sizes.room)

    def _pull(self, session: Session) -> None:
        step, data = self.next_step, self.batches.get_state()
        tasks, prompts = self._next_batch(longest=True)
        self.next_step += 1
        done = self._done_before.pop(step, set())
        left = {row for row in range(len(tasks)) if self._first_row + row not in done}
        keys = self._keys(tasks, step)
        records = session.submit(tasks, prompts, keys, len(tasks), only=left)
        self._origin |= {record: (step, record.prompt[1]) for record in records}
        self.pulled[step] = Pulled(data, left)

    def _next_batch(self, longest: bool = False) -> tuple[list[Task], PrefixBatch]:
        prepared = self._pull_batch()
        return [one.task for one in prepared], self.engine.prompts.collate(prepared, longest, cluster.most)

    def _pull_batch(self) -> Sequence[PreparedTask]:
        prepared = next(self.batches)
        failpoints.reach("after_pull")
        return prepared

    def _place_in_rollout(self) -> None:
        if self.engine.exchange.calls_under_way:
            failpoints.reach("in_rollout")

    def _trained(self, record: GroupRecord) -> None:
        step, row = self._origin.pop(record)
        self.pulled[step].left.discard(row)

    def _keys(self, tasks: Sequence[Task], step: int) -> list[list[np.ndarray]]:
        members = range(self.config.members)
        return [[lane_key(self.seed, step, task.id, m) for m in members] for task in tasks]
