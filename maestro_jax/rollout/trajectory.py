"""The host's record of an episode and of the group it belongs to (no jax)."""

import dataclasses
import enum
import itertools
import time
from typing import Any

import numpy as np

from maestro_jax.rewards.reward import RewardParts
from maestro_jax.types import Call, Observation, Status, Task


class Stage(enum.Enum):
    """Where a trajectory is in its life."""

    FRESH = "fresh"  # not begun; waits for a lane
    DECODING = "decoding"
    ENDED = "ended"  # its turn has ended and is not yet read
    WAITING = "waiting"  # its call is with the experts
    READY = "ready"  # an observation has come; waits to be read, in its lane or parked
    FINISHED = "finished"


@dataclasses.dataclass
class Timing:
    """Where the seconds of a trajectory went, on the host's clock."""

    submitted: float = dataclasses.field(default_factory=time.monotonic)  # a point in time, as are the others below
    assigned: float = 0.0  # when it got its first lane
    finished: float = 0.0
    begun: float = 0.0  # when the turn that is being written began
    called: float = 0.0  # when the last call went out
    answered: float = 0.0  # when the observation that is not yet read came
    decoding: float = 0.0  # seconds
    waiting: list[float] = dataclasses.field(default_factory=list)  # seconds, of each call
    unread: float = 0.0  # seconds that observations lay ready before a lane read them

    @property
    def queued(self) -> float:
        """Seconds from submission to its first lane; its group's prefill is among them."""
        return self.assigned - self.submitted


@dataclasses.dataclass
class Parked:
    """Where the keys and values of a trajectory without a lane are: pages of its shard, or rows on the host."""

    pages: list[int]
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)  # on the host: 2 L arrays [K, n, H]
    size: int = 0  # bytes on the host


@dataclasses.dataclass(eq=False)  # one is equal to itself only
class Trajectory:
    """One member's episode. Lists run over its own tokens: what the policy wrote and what it was told."""

    task: Task
    member: int
    number: int = 0  # among all trajectories of this process's sessions
    key: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2, np.uint32))
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)  # under the sampler; 0 for what it was told
    authored: list[bool] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)  # of the policy that wrote each token; -1: told
    calls: list[tuple[Call, Observation]] = dataclasses.field(default_factory=list)
    turns: int = 0
    answer: str | None = None
    well_formed: bool = True
    malformed: int = 0  # turns that held neither a well-formed call nor an answer, those that were cut left out
    unresolved: int = 0  # calls of names that the registry does not show
    cut: int = 0  # turns that ended where the token budget did
    marked: bool = False  # an infrastructure failure: leaves baseline and loss
    reward: RewardParts | None = None  # once it is graded, which happens once
    timing: Timing = dataclasses.field(default_factory=Timing)
    askers: list[str] = dataclasses.field(default_factory=list)  # of each call
    kept: list[tuple[Call, Observation]] = dataclasses.field(default_factory=list)  # good calls of an attempt before

    # What is going on.
    stage: Stage = Stage.FRESH
    group: "GroupRecord | None" = None
    pending: Call | None = None
    observation: list[int] = dataclasses.field(default_factory=list)  # ids that are to be appended
    # Where earlier thoughts are dropped, the cache holds other tokens than the lists above.
    again: list[int] = dataclasses.field(default_factory=list)  # what stays of the turn: read before the observation
    rewind: int | None = None  # how many tokens of the cache stay when they are read; None: all
    turn_start: int = 0  # tokens in the cache before the tag that opened the current turn's thought
    dropped: int = 0  # tokens of the lists above that the cache lacks
    closed_turn: bool = False  # whether the policy ended its last turn itself
    turn_versions: list[int] = dataclasses.field(default_factory=list)  # of the turn that is being written
    parked: Parked | None = None

    @property
    def finished(self) -> bool:
        return self.stage is Stage.FINISHED

    @property
    def held(self) -> int:
        """Tokens in its cache."""
        return len(self.tokens) - self.dropped

    @property
    def last_turn(self) -> list[int]:
        """What the policy wrote since it was last told something."""
        own = sum(1 for _ in itertools.takewhile(bool, reversed(self.authored)))
        return self.tokens[len(self.tokens) - own :]

    @property
    def asker(self) -> str:
        """Who asks with the turn that has just ended; its random key knows seed, step, task and member."""
        return f"{self.key.tobytes().hex()}/{self.turns}"

    @property
    def executed_calls(self) -> int:
        return sum(observation.status == Status.OK for _, observation in self.calls)

    @property
    def price(self) -> float:
        return sum(observation.usage.price for _, observation in self.calls)

    @property
    def seconds(self) -> float:
        """From submission to its end."""
        return self.timing.finished - self.timing.submitted

    def renewed(self, number: int) -> "Trajectory":
        """The same episode, not begun; calls before the first failure are answered already."""
        good = itertools.takewhile(lambda made: not made[1].status.is_infrastructure, self.calls)
        return Trajectory(self.task, self.member, number, self.key, kept=list(good), group=self.group)

    @property
    def kept_answer(self) -> Observation | None:
        """What the pending call was told in an attempt before."""
        place = len(self.calls)
        return self.kept[place][1] if place < len(self.kept) and self.kept[place][0] == self.pending else None

    def wrote(self, tokens: list[int], logprobs: list[float]) -> None:
        """Records a turn of the policy."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.authored += [True] * len(tokens)
        self.versions += self.turn_versions
        self.turn_versions = []

    def was_told(self, ids: list[int]) -> None:
        """Records an observation with its frame."""
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)
        self.authored += [False] * len(ids)
        self.versions += [-1] * len(ids)

    def finish(self) -> None:
        self.stage = Stage.FINISHED
        self.timing.finished = time.monotonic()


@dataclasses.dataclass(eq=False)
class GroupRecord:
    """The members of one task.

    Attributes:
      index: number among the groups of a session, in the order of submission.
      version: of the policy when the group was admitted.
      prompt: whatever the engine prefills it from.
      shard: whose lanes run it.
      slot: of its shard, -1 before it is admitted.
    """

    task: Task
    index: int
    members: list[Trajectory]
    prompt: Any = None
    version: int = -1
    shard: int = -1
    slot: int = -1
    _arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def __post_init__(self) -> None:
        for member in self.members:
            member.group = self

    @property
    def finished(self) -> bool:
        return all(member.finished for member in self.members)

    @property
    def marked(self) -> bool:
        return any(member.marked for member in self.members)

    def renew(self, first: int) -> None:
        """Has marked members begin anew; `first` is the number of member 0."""
        self.members = [m.renewed(first + m.member) if m.marked else m for m in self.members]
        self._arrays = None

    def arrays(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Tokens int32, log-probabilities float32 and authored bool `[n]` of each member, once they are over.

        Made at the first call and kept: turning long lists into arrays takes time.
        """
        if self._arrays is None:
            self._arrays = [
                (np.array(m.tokens, np.int32), np.array(m.logprobs, np.float32), np.array(m.authored, bool))
                for m in self.members
            ]
        return self._arrays
