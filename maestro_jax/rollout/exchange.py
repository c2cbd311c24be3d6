"""The edge between the device and the experts: one tiny callback program.

In: turns that ended on the device. Out: observations that have come back, as tokens. The callback
touches numpy only, returns at once (it waits, for a bounded time, only when no lane decodes), and
never raises: a fault becomes a status. Fully manual over the mesh, so every device's lanes are
served by its own process; with a tensor axis only index 0 speaks and the result is summed over it.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from maestro_jax.parallel.mesh import BATCH_AXES
from maestro_jax.policy.tokens import END_OF_TURN, Tokens
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout import protocol
from maestro_jax.rollout.state import Lane, RolloutState
from maestro_jax.types import Call, Observation, Status, StopReason, Task

Array = jax.Array
log = logging.getLogger(__name__)

# An observation is a proper user turn behind the policy's own, and a new assistant header.
_BEFORE = f"{END_OF_TURN}\n<|im_start|>user\n"
_AFTER = f"{END_OF_TURN}\n<|im_start|>assistant\n"
_NO_CALLS_LEFT = " Answer now."
_GRACE_SECONDS = 0.05  # after the first reply, how long an idle engine waits for its neighbours


def observation_frames() -> list[str]:
    """The text around observations, for the training of a tiny tokenizer."""
    wrapped = protocol.wrap_observation("0")
    return [f"{_BEFORE}{wrapped}{_AFTER}", f"{_BEFORE}{wrapped}{_NO_CALLS_LEFT}{_AFTER}"]


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """Limits of an episode; lengths in tokens, times in seconds."""

    max_calls: int
    observation_tokens: int  # most tokens of an observation's text
    observation_multiple: int  # the text is filled up with line ends to a multiple of so many tokens
    deadline: float
    turn_budget: int
    room: int


@dataclasses.dataclass
class Trajectory:
    """The host's record of one trajectory; its tokens stay on the device until the rollout ends."""

    task: Task
    member: int
    calls: list[tuple[Call, Observation]] = dataclasses.field(default_factory=list)
    turns: int = 0
    answer: str | None = None
    well_formed: bool = True
    marked: bool = False  # an infrastructure failure: leaves baseline and loss
    finished: bool = False
    pending: Call | None = None
    started: float = dataclasses.field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def executed_calls(self) -> int:
        return sum(observation.status == Status.OK for _, observation in self.calls)

    @property
    def price(self) -> float:
        return sum(observation.usage.price for _, observation in self.calls)


class Exchange:
    """Serves the lanes of this process. One at a time per engine; `begin` starts a rollout."""

    def __init__(self, tokens: Tokens, resolver: protocol.Resolver, dispatcher: Dispatcher, config: EpisodeConfig):
        self.tokens = tokens
        self.resolver = resolver
        self.dispatcher = dispatcher
        self.config = config
        self.trajectories: dict[int, Trajectory] = {}
        self.rollout = 0
        self.ready: dict[int, Observation] = {}
        # Devices of one process call back from several threads.
        self.lock = threading.Lock()
        self.before = tokens.encode(_BEFORE)
        self.after = tokens.encode(_AFTER)
        self.filler = tokens.encode("\n")[:1]
        # O: the longest observation with everything around it.
        longest = Observation("0 " * (config.observation_tokens + config.observation_multiple), Status.OK)
        self.observation_bucket = len(self.observation_ids(longest, last=True))

    def begin(self, tasks: Sequence[Task | None], members: int) -> None:
        """Starts a rollout of `members` episodes per task; None pads the batch. Lane = group * members + member."""
        with self.lock:
            self.rollout += 1
            self.ready.clear()
            self.trajectories = {
                group * members + member: Trajectory(task, member)
                for group, task in enumerate(tasks)
                if task is not None
                for member in range(members)
            }

    def serve(
        self,
        leader: np.ndarray,
        idle: np.ndarray,
        slot: np.ndarray,
        lane: np.ndarray,
        stop: np.ndarray,
        length: np.ndarray,
        turn: np.ndarray,
        turn_length: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The callback: numpy in, numpy out, for the lanes `[b, G]` of one device.

        Args:
          leader: bool `[]`, False on all but one index of the tensor axis.
          idle: bool `[]`, True when no lane of the mesh decodes.
          slot: int32 `[b, G]`, lane numbers as given to `begin`.
          lane, stop, length: the lanes' state.
          turn: int32 `[b, G, T]`, tokens of the current turn; `turn_length [b, G]` are real.

        Returns:
          New lane states int32 `[b, G]`, observations int32 `[b, G, O]` and their lengths `[b, G]`.
        """
        new_lane = np.array(lane)
        tokens = np.zeros((*lane.shape, self.observation_bucket), np.int32)
        lengths = np.zeros(lane.shape, np.int32)
        if not leader:
            return np.zeros_like(new_lane), tokens, lengths
        try:
            with self.lock:
                self._submit(slot, new_lane, stop, turn, turn_length)
                self._collect(slot, new_lane, wait=bool(idle))
                self._deliver(slot, new_lane, stop, length, tokens, lengths)
        except Exception:  # an exception in a callback would hang or abort the device program
            log.exception("the exchange failed; its lanes are marked and end here")
            self._abandon(slot, new_lane)
        return new_lane, tokens, lengths

    def _submit(self, slot: np.ndarray, lane: np.ndarray, stop: np.ndarray, turn: np.ndarray, n: np.ndarray) -> None:
        """Parses turns that have ended; calls go out, answers end their episode."""
        for at in zip(*np.nonzero(lane == Lane.STOPPED), strict=True):
            number, trajectory = int(slot[at]), self.trajectories[int(slot[at])]
            text = self.tokens.decode(turn[at][: n[at]])
            parsed = protocol.parse_turn(text, StopReason(int(stop[at])), self.resolver)
            trajectory.turns += 1
            trajectory.well_formed &= parsed.well_formed
            lane[at] = Lane.WAITING
            last_turn = trajectory.turns > self.config.max_calls
            if parsed.kind is protocol.TurnKind.ANSWER:
                trajectory.answer = parsed.answer
                lane[at] = self._finish(trajectory)
            elif last_turn:
                trajectory.well_formed = False
                lane[at] = self._finish(trajectory)
            elif parsed.call is not None:
                trajectory.pending = parsed.call
                remaining = self.config.deadline - (time.monotonic() - trajectory.started)
                self.dispatcher.submit(
                    self._ticket(number), parsed.call, trajectory.task.question, trajectory.task.images, remaining
                )
            else:
                self.ready[number] = Observation(parsed.error, parsed.status)

    def _collect(self, slot: np.ndarray, lane: np.ndarray, wait: bool) -> None:
        """Takes what the experts have answered; an idle engine waits a bounded time for more."""
        waiting = {int(i) for i in slot[lane == Lane.WAITING]}
        give_up = time.monotonic() + 1.0
        while True:
            fresh = [(ticket, obs) for ticket, obs in self.dispatcher.collect() if ticket >> 32 == self.rollout]
            for ticket, observation in fresh:
                self.ready[ticket & 0xFFFFFFFF] = observation
            if fresh:
                give_up = min(give_up, time.monotonic() + _GRACE_SECONDS)
            remaining = give_up - time.monotonic()
            if not wait or waiting <= self.ready.keys() or remaining <= 0:
                return
            self.dispatcher.wait(remaining)

    def _deliver(
        self,
        slot: np.ndarray,
        lane: np.ndarray,
        stop: np.ndarray,
        length: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Turns ready observations into tokens for their lanes."""
        for at in zip(*np.nonzero(lane == Lane.WAITING), strict=True):
            number = int(slot[at])
            if number not in self.ready:
                continue
            observation, trajectory = self.ready.pop(number), self.trajectories[number]
            if trajectory.pending is not None:
                trajectory.calls.append((trajectory.pending, observation))
                trajectory.pending = None
            trajectory.marked |= observation.status.is_infrastructure
            ids = self.observation_ids(observation, last=trajectory.turns >= self.config.max_calls)
            if stop[at] == StopReason.END_OF_TURN:
                ids = ids[1:]  # the policy has closed its turn itself
            if length[at] + len(ids) >= self.config.room:
                trajectory.well_formed = False
                lane[at] = self._finish(trajectory)
                continue
            tokens[at][: len(ids)], lengths[at] = ids, len(ids)
            lane[at] = Lane.DECODING

    def observation_ids(self, observation: Observation, last: bool) -> list[int]:
        """A whole user turn with the neutralised, capped observation, and the next assistant header."""
        body = self.body_ids(observation.text)
        body += self.filler * (-len(body) % self.config.observation_multiple)
        note = self.tokens.encode(_NO_CALLS_LEFT) if last else []
        opening = self.tokens.encode(protocol.OBSERVATION_OPEN)
        closing = self.tokens.encode(f" {protocol.OBSERVATION_CLOSE}")
        return [*self.before, *opening, *body, *closing, *note, *self.after]

    def body_ids(self, text: str) -> list[int]:
        """Foreign text, neutralised and capped; with its leading space, so that a quote has the same tokens."""
        ids = self.tokens.encode_foreign(f" {protocol.neutralise(text, self.tokens.special_texts)}")
        return protocol.cap_ids(ids, self.config.observation_tokens, self.tokens.encode(" ..."))

    def _ticket(self, number: int) -> int:
        """Tickets carry the rollout, so that a late reply to an abandoned one is not taken for a new one's."""
        return self.rollout << 32 | number

    def _finish(self, trajectory: Trajectory) -> Lane:
        trajectory.finished = True
        trajectory.seconds = time.monotonic() - trajectory.started
        return Lane.DONE

    def _abandon(self, slot: np.ndarray, lane: np.ndarray) -> None:
        for at in np.ndindex(lane.shape):
            trajectory = self.trajectories.get(int(slot[at]))
            if trajectory is not None and not trajectory.finished:
                trajectory.marked = True
                self._finish(trajectory)
            lane[at] = Lane.DONE


def make_exchange_program(
    exchange: Exchange, mesh: Mesh
) -> Callable[[RolloutState, Array], tuple[Array, Array, Array, Array]]:
    """Compiles the exchange: `(state, slots) → (lane, observations, lengths, counts)`.

    `counts` int32 `[2]` is replicated: lanes that are not done, and observations that arrived. All
    processes read it, so all enqueue the same programs in the same order.
    """
    config = exchange.config
    groups = PartitionSpec(BATCH_AXES)

    def local(
        slot: Array, lane: Array, stop: Array, length: Array, turn: Array, turn_length: Array
    ) -> tuple[Array, Array, Array, Array]:
        leader = jax.lax.axis_index("tensor") == 0
        decoding = jax.lax.psum(jnp.sum(lane == Lane.DECODING), BATCH_AXES)
        shapes = (
            jax.ShapeDtypeStruct(lane.shape, jnp.int32),
            jax.ShapeDtypeStruct((*lane.shape, exchange.observation_bucket), jnp.int32),
            jax.ShapeDtypeStruct(lane.shape, jnp.int32),
        )
        answered = io_callback(
            exchange.serve, shapes, leader, decoding == 0, slot, lane, stop, length, turn, turn_length
        )
        new_lane, tokens, lengths = jax.lax.psum(answered, "tensor")
        counts = jnp.stack([jnp.sum(new_lane != Lane.DONE), jnp.sum(lengths > 0)]).astype(jnp.int32)
        return new_lane, tokens, lengths, jax.lax.psum(counts, BATCH_AXES)

    manual = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(groups,) * 6,
        out_specs=(groups, groups, groups, PartitionSpec()),
        check_vma=False,
    )

    def program(state: RolloutState, slot: Array) -> tuple[Array, Array, Array, Array]:
        steps = jnp.minimum(state.turn_start[..., None] + jnp.arange(config.turn_budget), config.room - 1)
        turn = jnp.take_along_axis(state.tokens, steps, axis=-1)
        turn_length = state.length - state.turn_start
        return manual(slot, state.lane, state.stop, state.length, turn, turn_length)

    return jax.jit(program)
