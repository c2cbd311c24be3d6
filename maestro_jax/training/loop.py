"""Reinforcement from update to update: what is due after each, what a checkpoint holds, and how a run goes on."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from maestro_jax import failpoints
from maestro_jax.checkpoint.store import CheckpointStore
from maestro_jax.config import Config
from maestro_jax.errors import NonFiniteError
from maestro_jax.evaluation.policy import Evaluation
from maestro_jax.grpo.batch import Scored, rewards_of
from maestro_jax.grpo.learner import Learner
from maestro_jax.grpo.ledger import trained_row
from maestro_jax.grpo.skipped import Skipped, Skips
from maestro_jax.grpo.update import TrainState
from maestro_jax.observe.metrics import MetricsWriter
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import cluster, preemption
from maestro_jax.rewards.reward import RewardParts
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.supply import Supply
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.session.binding import check_same_settings
from maestro_jax.session.calls import Calls

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run keeps of its training.

    Attributes:
      metrics, ledger: written line by line, by process 0.
      hashes: of the settings; a checkpoint of others is refused.
      began: when the command did, as `time.monotonic` counts.
    """

    store: CheckpointStore
    metrics: MetricsWriter
    ledger: MetricsWriter
    hashes: Mapping[str, str]
    began: float


class Training:
    """The policy after its last update, and all that the next ones need: first `begin`, then `run`.

    Args:
      evaluate: a policy on the held-out tasks.

    Attributes:
      state: the policy and its optimiser.
      step: updates made.
      last: the last evaluation of a policy of this run; None before there is one.
    """

    state: TrainState

    def __init__(
        self,
        config: Config,
        learner: Learner,
        supply: Supply,
        calls: Calls,
        record: Record,
        evaluate: Callable[[nnx.State], Evaluation],
        progress: Progress,
    ):
        self.step = 0
        self.last: Evaluation | None = None
        self._config, self._learner, self._supply, self._calls, self._record = config, learner, supply, calls, record
        self._evaluate, self._progress = evaluate, progress
        self._skips = Skips(config.optimizer.max_skipped, "config.optimizer", progress.note)
        self._seconds_before = 0.0  # of earlier processes
        self._evaluated: Evaluation | None = None  # the policy as it is now
        self._row: dict[str, Any] | None = None  # metrics of the last update, while what is due after it is not done
        self._behind: dict[str, Any] = {}  # where data and journals go on behind the last update
        self._saved: int | None = None  # the last step that there is a checkpoint of
        self._waited = False  # whether the last line of metrics is of a wait
        calls.outages.on_wait = self._note_wait

    @property
    def checkpoints(self) -> Path | str:
        """Where the policies of this run are."""
        return self._record.store.directory

    @property
    def seconds(self) -> float:
        """That the run has taken, with all its processes one after the other."""
        return self._seconds_before + time.monotonic() - self._record.began

    def begin(self, state: TrainState, before: Evaluation | None) -> None:
        """Starts from `state`, or from the newest checkpoint, in the shape and shardings of `state`.

        Args:
          before: the evaluation of `state`, if there is one.
        """
        self.last = before
        restored = self._record.store.restore_newest(state)
        if restored is None:
            self.state, self._behind = state, self._position()
        else:
            self.state, self.step = restored.state, restored.step
            self._take(restored.run)
            recall(self._calls, self._behind["journal"], self._progress)
        metrics, ledger = self._record.metrics, self._record.ledger
        metrics.truncate_after(self.step - 1 if self.step == 0 or self._row is not None else self.step)
        ledger.truncate_after(self.step)
        if self.step == 0 and before is not None:
            metrics.write({"step": 0, **held_out(before)})

    def _take(self, run: Mapping[str, Any]) -> None:
        """What a checkpoint says of the run."""
        check_same_settings(
            run.get("bound", self._record.hashes), self._record.hashes, str(self._record.store.directory)
        )
        self._supply.set_state(run["supply"])
        self._behind = {"supply": run["supply"], "journal": run["journal"]}
        self._row, self._seconds_before, self._saved = run["row"], run["seconds"], self.step
        self._skips.in_a_row = run.get("skipped", 0)
        if run["evaluated"] is not None:
            self.last = self._evaluated = Evaluation.from_json(run["evaluated"])
        self._progress.note(f"resumed from the checkpoint of step {self.step}")

    def run(self) -> None:
        """Trains until all steps are made.

        Raises:
          Preempted: the run was told to stop, or experts did not come back; its last update is saved.
          NonFiniteError: several updates in a row were not finite; checkpoints are those before them.
        """
        self._progress.phase("train", self._config.grpo.steps, done=self.step)
        try:
            self._conclude()
            while self.step < self._config.grpo.steps:
                preemption.check()
                self._record.store.check()
                self._update()
                self._conclude()
            if self._evaluated is None:  # nothing was left to train
                self._calls.journal.begin("trained")
                self.last = self._evaluate(self.state.params)
                self._end_wait()
        except preemption.Preempted as stop:
            if self._saved != self.step:
                self._save()
            self._record.store.close()
            stop.saved = f"step {self.step} is saved"
            raise
        self._calls.outages.on_wait = lambda shares: None
        self._record.store.close()

    def _update(self) -> None:
        step, began = self.step + 1, time.monotonic()
        self._calls.journal.begin(f"step {step}")
        rollouts = Stopwatch(until_committed(self._supply.step(self.state.params, step), self._record.store))
        skipped: list[Skipped] = []
        self.state, seen, metrics = self._learner(self.state, rollouts, skipped.append)
        self.step, self._evaluated, self._behind = step, None, self._position()
        failpoints.reach("after_update")
        self._record.ledger.write(trained_row(step, seen, *skipped))
        times = {"rollout_seconds": rollouts.seconds, "seconds": time.monotonic() - began}
        marked = {f"marked/{expert}": share for expert, share in self._supply.marked.items()}
        self._row = {"step": step, **episode_metrics(seen, step), **metrics, **marked, **times}
        shown = ("reward", "accuracy", "calls", *marked, "seconds")
        self._progress.update(step, {name: self._row[name] for name in shown})
        try:
            self._skips.after(f"step {step}", skipped[0] if skipped else None)
        except NonFiniteError:
            self._end_wait()
            self._record.metrics.write(self._row)
            raise

    def _conclude(self) -> None:
        """Does what is due after the last update: evaluation, the line of metrics, the checkpoint."""
        if self._row is None:
            return
        if self._is_due(self._config.evaluate.every):
            self._calls.journal.begin(f"held-out, step {self.step}")
            self.last = self._evaluated = self._evaluate(self.state.params)
            self._row |= held_out(self.last)
            if self.step < self._config.grpo.steps:
                self._progress.phase("train", self._config.grpo.steps, done=self.step)
        self._end_wait()
        self._record.metrics.write(self._row)
        self._row = None
        failpoints.reach("after_metrics")
        if self._saved != self.step and self._is_due(self._config.checkpoint.every):
            self._save()

    def _note_wait(self, shares: Mapping[str, float]) -> None:
        """A line of metrics that stands as long as the run waits, and stays if it ends there."""
        self._end_wait()
        step = self.step + 1 if self._row is None else self.step
        self._record.metrics.write({"step": step} | {f"waiting/{expert}": share for expert, share in shares.items()})
        self._waited = True

    def _end_wait(self) -> None:
        if self._waited:
            self._record.metrics.truncate_after(self.step if self._row is None else self.step - 1)
            self._waited = False

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self._config.grpo.steps

    def _save(self) -> None:
        """Starts a checkpoint of the last update. What leads up to it is on disk before it is."""
        failpoints.reach("before_save")
        for file in (self._calls.journal, self._record.metrics, self._record.ledger):
            file.sync()
        facts = {
            **self._behind,
            "seed": self._config.seed,
            "bound": dict(self._record.hashes),
            # With gaps it is none to keep: a run that goes on asks again.
            "evaluated": self._evaluated.to_json() if self._evaluated and not self._evaluated.missing else None,
            "row": self._row,
            "seconds": self.seconds,
            "skipped": self._skips.in_a_row,
        }
        self._record.store.save(self.step, self.state, facts)
        self._saved = self.step
        failpoints.reach("after_save")
        self._calls.report()

    def _position(self) -> dict[str, Any]:
        """Where data and journals go on from here: what is pulled later is pulled again, what is asked is recalled."""
        journal = self._calls.journal
        sizes = cluster.gather((Path(journal.path).name, journal.size()))
        return {"supply": self._supply.get_state(), "journal": dict(sizes)}


def recall(calls: Calls, since: Mapping[str, int], progress: Progress) -> None:
    """Calls that were answered behind these places in the journals are not made again (`Resumed.recall`)."""
    if count := calls.answered.recall(since):
        progress.note(f"{count} calls were answered before the interruption and are not made again")


def until_committed(rollouts: Iterator[T], store: CheckpointStore) -> Iterator[T]:
    """The rollouts of a step; with the last of them, what was being saved is there.

    A save takes its time while experts work. Were it to take longer than a step, a kill could cost two intervals.
    """
    yield from rollouts
    store.wait()


class Stopwatch(Iterator[T]):
    """An iterator that counts the seconds its items took to come."""

    def __init__(self, items: Iterator[T]):
        self.items = items
        self.seconds = 0.0

    def __next__(self) -> T:
        began = time.monotonic()
        try:
            return next(self.items)
        finally:
            self.seconds += time.monotonic() - began


def held_out(found: Evaluation) -> dict[str, float]:
    """Metrics of an evaluation; with gaps, under names of their own, which no curve shows."""
    if found.missing:
        return {"held_out_missing": found.missing, "held_out_answered_accuracy": found.accuracy}
    return {"held_out_accuracy": found.accuracy, "held_out_reward": found.reward}


def episode_metrics(seen: Sequence[tuple[Rollout, Scored]], version: int) -> dict[str, float]:
    """Averages over the trajectories of a step, of all processes, those of replaced groups among them."""
    parts = [
        [
            episode_figures(trajectory, reward, version)
            for groups in (rollout.trajectories, rollout.replaced or [])
            for group, rewards in zip(groups, rewards_of(groups), strict=True)
            for trajectory, reward in zip(group, rewards, strict=True)
        ]
        for rollout, _ in seen
    ]
    figures = cluster.joined(parts)
    columns = {name: np.array([figure[name] for figure in figures]) for name in figures[0]}
    tokens, ages = columns.pop("authored"), columns.pop("ages")
    # Without a verdict, outcome and reward are NaN: such an episode counts in neither.
    found = {name: float(np.nanmean(column)) for name, column in columns.items()}
    # Versions between a token and the update that it is in; and what all calls cost, not each.
    return found | {"price": float(columns["price"].sum()), "staleness": float(ages.sum()) / float(tokens.sum())}


def episode_figures(trajectory: Trajectory, parts: RewardParts, version: int) -> dict[str, float]:
    return {
        "reward": parts.total,
        "accuracy": parts.outcome,
        "format": parts.format,
        "cost": parts.cost,
        "latency": parts.latency,
        **{f"reward/{name}": term for name, term in parts.terms.items()},
        "calls": trajectory.executed_calls,
        "malformed": trajectory.malformed,
        "unresolved": trajectory.unresolved,
        "cut": trajectory.cut,
        "price": trajectory.price,
        "queue_seconds": trajectory.timing.queued,
        "waiting_seconds": sum(trajectory.timing.waiting),
        "authored": sum(trajectory.authored),
        "ages": sum(version - v for v, own in zip(trajectory.versions, trajectory.authored, strict=True) if own),
    }
