"""What is done where experts fail: ask again, wait until they are back, or stop and go on later.

A failure says nothing about the policy, so a figure that was measured while an expert was missing is none. Training
goes on without the marked episodes while they are few (`OutageConfig.max_marked` of a step). More of them, and every
failure of an evaluation, a baseline or a demonstration, are asked again with the same keys, so that what comes out is
what a run without the outage gives. Who waits longer than `patience` stops with exit code 75 (`preemption.give_up`).

Of several processes all decide alike: counts are summed, the clock is that of process 0.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from maestro_jax.errors import ConfigError
from maestro_jax.parallel import cluster, preemption
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.types import Status

# How often something is asked again whose expert answers others: an input that always times out must not block a run.
RETRIES = 3
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before something is asked again; doubled each time
LOOK_SECONDS = 0.25  # between looks at whether an expert is back, or the run was told to stop
_NAMED = 3  # experts that a line names
NOBODY = "this process"  # whose failure it is where no call failed


@dataclasses.dataclass(frozen=True)
class OutageConfig:
    """When a run waits and when it stops.

    Attributes:
      max_marked: the largest share of a step's episodes, or of an evaluation's, that may be without a result.
      patience: seconds to wait for experts that are out.
    """

    max_marked: float
    patience: float


@dataclasses.dataclass(frozen=True)
class Marks:
    """Of how many episodes (or calls) failures got in the way, and whose; plain numbers, which processes add up.

    Attributes:
      refused: those that an expert refused for its set-up (CONFIG_ERROR); to ask again does not help.
      experts: those that each expert failed.
      reasons: a word on each expert's failures.
    """

    total: int = 0
    marked: int = 0
    refused: int = 0
    experts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, items: Iterable[tuple[bool, Sequence[tuple[str, Status]]]]) -> "Marks":
        """Of items that are marked or not, each with the experts that it called and how that ended."""
        total, marked, refused = 0, 0, 0
        experts, reasons = collections.Counter[str](), dict[str, str]()
        for is_marked, calls in items:
            total += 1
            if is_marked:
                failed = {expert: status for expert, status in calls if status.is_infrastructure}
                marked += 1
                refused += Status.CONFIG_ERROR in failed.values()
                experts.update(list(failed) or [NOBODY])
                reasons |= {expert: status.name.lower() for expert, status in failed.items()}
        return cls(total, marked, refused, dict(experts), reasons)

    @classmethod
    def of_episodes(cls, episodes: Iterable[Trajectory]) -> "Marks":
        return cls.of((one.marked, [(call.expert, seen.status) for call, seen in one.calls]) for one in episodes)

    def __add__(self, other: "Marks") -> "Marks":
        return Marks(
            self.total + other.total,
            self.marked + other.marked,
            self.refused + other.refused,
            dict(collections.Counter(self.experts) + collections.Counter(other.experts)),
            {**other.reasons, **self.reasons},
        )

    def everywhere(self) -> "Marks":
        """Those of all processes together; all of them ask."""
        told = [Marks(**found) for found in cluster.gather(dataclasses.asdict(self))]
        return sum(told[1:], told[0])

    @property
    def share(self) -> float:
        return self.marked / max(self.total, 1)

    @property
    def shares(self) -> dict[str, float]:
        """Expert → share of all items that it failed, the largest first."""
        ordered = sorted(self.experts.items(), key=lambda item: (-item[1], item[0]))
        return {expert: count / max(self.total, 1) for expert, count in ordered}


class Outages:
    """Waits for the experts of a run.

    Args:
      called: names of the experts that the policy may call itself; others are behind those.
      shunned: experts and services that cannot be asked right now, with the reason (`Dispatcher.shunned`).
      note: takes a line for the terminal.
      replayed: whether calls are answered from a journal, which holds how the waiting ended: nothing is asked again.

    Attributes:
      on_wait: hears the shares by expert whenever a wait begins.
    """

    def __init__(
        self,
        config: OutageConfig,
        called: Collection[str],
        shunned: Callable[[], Mapping[str, str]],
        note: Callable[[str], None],
        replayed: bool = False,
    ):
        self.on_wait: Callable[[Mapping[str, float]], None] = lambda shares: None
        self._config, self._called, self._shunned, self._note = config, frozenset(called), shunned, note
        self._replayed = replayed
        self._waited = 0.0  # seconds, in this outage; what runs again in between is no waiting
        self._pauses = 0

    def tolerates(self, marks: Marks, what: str) -> bool:
        """Whether so few are marked that training goes on without them. If not, returns when to ask them again.

        Raises:
          Preempted: patience is at its end.
          ConfigError: it is the set-up that experts refuse.
        """
        if self._replayed or marks.share <= self._config.max_marked:
            self._end()
            return True
        self._check_set_up(marks, what)
        self._wait(marks, what)
        return False

    def insist(self, count: Callable[[], Marks], again: Callable[[], None], what: str) -> Marks:
        """Has what failed asked again until it is answered; returns what is left.

        That is what experts refuse for their set-up, and what fails again and again while its expert answers others.

        Args:
          count: of all processes.
          again: asks once more for what is marked.

        Raises:
          Preempted: patience is at its end.
        """
        retries = 0
        while (marks := count()).marked > marks.refused and not self._replayed:
            if self._out(marks) or marks.share > self._config.max_marked:
                self._wait(
                    marks, what
                )  # some are out that nobody shuns: classes of this process, servers that are busy
            elif retries < RETRIES:
                self._pause(FIRST_PAUSE * 2**retries)
                retries += 1
            else:
                break
            again()
        self._end()
        return marks

    def check(self, marks: Marks, what: str) -> None:
        """Refuses to call it a result where too many are left without one.

        Raises:
          Preempted: so it is; ask again later.
          ConfigError: it is the set-up that experts refuse.
        """
        if marks.marked and (marks.share > self._most or marks.marked == marks.total):
            self._check_set_up(marks, what)
            preemption.give_up(
                f"{marks.marked} of {marks.total} {what} have no answer of {listed(marks)}, more than "
                f"config.rollout.max_marked={self._config.max_marked:g} allows"
            )

    @property
    def _most(self) -> float:
        return 1.0 if self._replayed else self._config.max_marked

    def _check_set_up(self, marks: Marks, what: str) -> None:
        if marks.refused > self._most * marks.total or marks.refused == marks.total:
            raise ConfigError(
                f"{marks.refused} of {marks.total} {what} were refused by {listed(marks)}: a key, model, endpoint or "
                "option is wrong; `python -m maestro_jax.doctor` with this config says which (a judge may also reply "
                "without a verdict; then the log quotes it)"
            )

    # ---- waiting -------------------------------------------------------------------------------------------

    def _wait(self, marks: Marks, what: str) -> None:
        """Returns when it is worth while to ask again."""
        if set(marks.experts) == {NOBODY} and self._pauses >= RETRIES:
            raise RuntimeError(
                f"{marks.marked} of {marks.total} {what} fail again and again, and no expert did: see the log"
            )
        self.on_wait(marks.shares)
        before, entered = self._waited, self._look(marks)[0]
        while True:
            now, out = self._look(marks)
            self._waited = before + now - entered
            left = self._config.patience - self._waited
            who = listed(marks, out)
            if left <= 0:
                preemption.give_up(
                    f"waited {self._config.patience:g} s (config.rollout.patience) for {who}: "
                    f"{100 * marks.share:.0f} % of {what} met an outage ({reason(marks, out)})"
                )
            seconds = min(FIRST_PAUSE * 2 ** min(self._pauses, 10), LONGEST_PAUSE, left)
            self._pauses += 1
            self._note(
                f"waiting for {who}: {100 * marks.share:.0f} % of {what} met an outage ({reason(marks, out)}), "
                f"next try in {seconds:.0f} s, gives up in {left:.0f} s"
            )
            out = self._out_until(marks, now + seconds, bool(out))
            self._waited = before + self._look(marks)[0] - entered
            # The longest pause ends with a try whoever is out: a server may answer requests and no probe.
            if not out or seconds == LONGEST_PAUSE:
                return

    def _out_until(self, marks: Marks, until: float, was_out: bool) -> dict[str, str]:
        """Who cannot be asked even then; ends early when they are back."""
        while True:
            now, out = self._look(marks)
            if (was_out and not out) or now >= until:
                return out
            time.sleep(min(LOOK_SECONDS, until - now))

    def _pause(self, seconds: float) -> None:
        end = self._look(Marks())[0] + seconds
        while (now := self._look(Marks())[0]) < end:
            time.sleep(min(LOOK_SECONDS, end - now))

    def _out(self, marks: Marks) -> dict[str, str]:
        return self._look(marks)[1]

    def _look(self, marks: Marks) -> tuple[float, dict[str, str]]:
        """The time, and which of those who failed cannot be asked: they, or whoever is behind them. All processes ask.

        Raises:
          Preempted: the run was told to stop.
        """
        mine: tuple[bool, dict[str, str], float] = preemption.requested(), dict(self._shunned()), time.monotonic()
        told = cluster.gather(mine)
        if any(stop for stop, _, _ in told):
            preemption.stop()
        out = {name: why for _, found, _ in told for name, why in found.items()}
        of_these = {n: why for n, why in out.items() if n in marks.experts or n not in self._called}
        return told[0][2], of_these if marks.marked else {}

    def _end(self) -> None:
        self._waited, self._pauses = 0.0, 0


def listed(marks: Marks, out: Mapping[str, str] | None = None) -> str:
    """Who failed and how often, the most frequent first, and whoever is behind them: "Chart-Lens (43 %)"."""
    names = [f"{name} ({100 * share:.0f} %)" for name, share in marks.shares.items()]
    names += [name for name in out or {} if name not in marks.experts]
    if len(names) > _NAMED:
        names[_NAMED:] = [f"{len(names) - _NAMED} more"]
    return " and ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def reason(marks: Marks, out: Mapping[str, str]) -> str:
    """Why, of the one that failed most often or is out."""
    return next(iter(out.values()), "") or next(iter(marks.reasons.values()), "a fault of its own")
