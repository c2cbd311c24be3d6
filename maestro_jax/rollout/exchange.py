"""The edge between the device and the experts: one tiny callback program.

In: turns that ended on the device. Out: orders for the lanes (`rollout/scheduler.py`), among them the observations
that have come back, as tokens. The callback touches numpy only, returns at once (it waits, for a bounded time, only
when no lane decodes and nothing can be ordered), and never raises: a fault becomes a status. Fully manual over the
mesh, so every shard's lanes are served by their own process, with its own registry; with a tensor axis only index 0
speaks and the result is summed over it.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from maestro_jax.errors import ConfigError
from maestro_jax.parallel import preemption
from maestro_jax.parallel.mesh import BATCH_AXES
from maestro_jax.policy.tokens import ASSISTANT_HEADER, END_OF_TURN, Tokens
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.registry.skills.running import failure
from maestro_jax.rollout import protocol
from maestro_jax.rollout.programs import PackedField
from maestro_jax.rollout.scheduler import Capacity, Orders, Scheduler, orders_layout
from maestro_jax.rollout.state import Lane, Lanes
from maestro_jax.rollout.trajectory import Stage, Trajectory
from maestro_jax.types import Observation, Status, StopReason

Array = jax.Array
log = logging.getLogger(__name__)

# An observation is a proper user turn behind the policy's own, and a new header of the template's.
_BEFORE = f"{END_OF_TURN}\n<|im_start|>user\n"
NO_CALLS_LEFT = " Answer now."
# A token of its own behind any text, however often it stands there: as text, an episode has the ids that were trained.
_FILLER = " ."
_LETTERS = 32  # of a token, at most, where only the head and the tail of a long text are encoded
# How long an idle engine waits for a reply before it looks round again; other processes may have got one.
_PATIENCE_SECONDS, _PATIENCE_AMONG_PROCESSES = 1.0, 0.02


def observation_frame(body: str, last: bool, header: str = ASSISTANT_HEADER) -> str:
    """What stands between two turns of the policy around an observation; `body` begins with a space, if with anything.

    Args:
      last: whether no call is left.
      header: of the next turn (`Tokens.header`).
    """
    note = NO_CALLS_LEFT if last else ""
    return f"{_BEFORE}{protocol.OBSERVATION_OPEN}{body} {protocol.OBSERVATION_CLOSE}{note}{END_OF_TURN}\n{header}"


def observation_frames(header: str = ASSISTANT_HEADER) -> list[str]:
    """The text around observations, for the training of a tiny tokenizer."""
    return [observation_frame(f" 0{_FILLER}", last, header) for last in (False, True)]


@dataclasses.dataclass(frozen=True)
class EpisodeConfig:
    """Limits of an episode; lengths in tokens, times in seconds."""

    max_calls: int
    observation_tokens: int  # most tokens of an observation's text
    observation_multiple: int  # the text is filled up with full stops to a multiple of so many tokens
    deadline: float  # seconds an episode may wait for experts, over all its calls
    turn_budget: int
    room: int
    earlier_thoughts: str = "keep"  # or "drop", as of `RolloutConfig`


class Exchange:
    """Serves the shards of this process, those of one session at a time.

    The devices of one process call back from several threads: what they do to trajectories, they do under `lock`. The
    engine's loop takes turns with them. It may be entered again: an abandoned run that is collected catches up, too.
    """

    def __init__(self, tokens: Tokens, resolver: protocol.Resolver, dispatcher: Dispatcher, config: EpisodeConfig):
        self.tokens = tokens
        self.resolver = resolver
        self.dispatcher = dispatcher
        self.config = config
        self.lock = threading.RLock()
        self.schedulers: dict[int, Scheduler] = {}
        self.version = 0  # of the policy that decodes
        self.patient = True  # whether an idle engine waits for replies; False while it has something else to do
        self.history: list[tuple[float, int, np.ndarray]] = []  # time, shard, what its lanes had been doing until then
        self._waiting: dict[int, tuple[Scheduler, Trajectory]] = {}  # by ticket, the trajectory's number
        self._ended: list[tuple[Scheduler, Trajectory, list[int], StopReason]] = []  # turns that are to be read
        self._outgoing: list[tuple[Scheduler, Trajectory]] = []  # whose calls are to be sent
        self._unsent: list[tuple[int, Observation]] = []  # calls whose replies are there without being sent
        self._replies: dict[int, tuple[float, list[int]]] = {}  # by ticket: when a reply came, and its ids
        dispatcher.reader = self._read_ahead
        self._rounds: dict[int, int] = {}  # of each shard
        self._last_news = 0  # round in which a shard of this process last found something to do
        opening = protocol.opened_thought(tokens.header)
        self.in_thought = bool(opening)  # whether turns begin inside a thought
        # Where earlier thoughts are dropped, the tag that opened them goes, too: so it stands in no prompt (`Prompts`).
        self.opening_thought = tokens.encode(opening) if config.earlier_thoughts == "drop" else []
        self.before = tokens.encode(_BEFORE)
        self.after = tokens.encode(f"{END_OF_TURN}\n{tokens.header}")
        self.filler = tokens.encode(_FILLER)
        self.opening = tokens.encode(protocol.OBSERVATION_OPEN)
        self.closing = tokens.encode(f" {protocol.OBSERVATION_CLOSE}")
        self.no_calls_left = tokens.encode(NO_CALLS_LEFT)
        self.cut = tokens.encode(" ...")
        self._check_filler()
        # O: the longest observation with everything around it.
        longest = Observation("0 " * (config.observation_tokens + config.observation_multiple), Status.OK)
        self.observation_bucket = len(self.observation_ids(longest, last=True))
        if config.earlier_thoughts == "drop":
            if not opening or self.after[-len(self.opening_thought) :] != self.opening_thought:
                raise ConfigError(
                    'config.rollout.earlier_thoughts="drop" needs a chat template that opens a thought in every turn, '
                    'as those of Thinking checkpoints do; set it to "keep"'
                )
            self.observation_bucket += config.turn_budget + 1  # the turn is read again, and is closed

    def begin(self, schedulers: dict[int, Scheduler], version: int) -> None:
        """Serves these shards from now on, under a policy of this version. Replies to others' calls are kept."""
        with self.lock:
            self.schedulers, self.version = schedulers, version
            self.patient = True
            self.history = []
            self._rounds = dict.fromkeys(schedulers, 0)
            self._last_news = 0

    @property
    def calls_under_way(self) -> int:
        return len(self._waiting)

    def catch_up(self) -> None:
        """Reads turns that have ended and sends their calls; the engine's loop calls it once the device has work again.

        Reading takes time, and whatever sends calls competes for the interpreter: the device would wait meanwhile.
        """
        if preemption.requested():
            return  # what is sent now would be paid for and not be heard
        with self.lock:
            self._read()
            outgoing = [waiting for waiting in self._outgoing if not waiting[1].finished]  # those were abandoned
            self._outgoing = []
            for scheduler, trajectory in outgoing:
                self._waiting[trajectory.number] = scheduler, trajectory
                trajectory.timing.called = time.monotonic()
        for _, trajectory in outgoing:
            remaining = self.config.deadline - sum(trajectory.timing.waiting)
            task, call, number = trajectory.task, trajectory.pending, trajectory.number
            assert call is not None  # it waits for this one
            trajectory.askers.append(trajectory.asker)
            if (kept := trajectory.kept_answer) is not None:
                trajectory.timing.called -= kept.seconds  # the deadline counts what it took
                with self.lock:
                    self._unsent.append((number, kept))
                continue
            try:
                self.dispatcher.submit(number, call, task.question, task.images, remaining, trajectory.asker)
            except Exception:  # no thread to be had, say: the call failed, and the others go on
                log.exception("the call of trajectory %d could not be sent", number)
                with self.lock:
                    self._unsent.append((number, failure(Status.UNAVAILABLE)))

    # ---- the callback --------------------------------------------------------------------------------------

    def serve(
        self,
        capacity: Capacity,
        shard: np.ndarray,
        leader: np.ndarray,
        idle: np.ndarray,
        status: np.ndarray,
        stop: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        written: np.ndarray,
    ) -> tuple[Orders, np.ndarray]:
        """The callback: numpy in, numpy out, for the lanes `[1, S]` of one shard.

        Args:
          capacity: of every shard.
          shard: int32 `[1]`, its number.
          leader: bool `[]`, False on all but one index of the tensor axis.
          idle: bool `[]`, True when no lane of the mesh decodes.
          status, stop, written: int32 `[1, S]`; tokens, logprobs: `[1, S, T]`, of the current turns.

        Returns:
          Orders, and counts int32 `[len(COUNTED)]`; zeros if this is no leader.
        """
        number = int(shard[0])
        if not leader:
            orders = Orders.none(capacity)
            orders.packed[:] = 0
            return orders, np.zeros(len(COUNTED), np.int32)
        scheduler = self.schedulers[number]
        try:
            with self.lock:
                self._rounds[number] += 1
                self.history.append((time.monotonic(), number, _occupation(scheduler, status[0])))
                self._hear(scheduler, status[0], stop[0], tokens[0], logprobs[0], written[0])
                self._collect()
                if scheduler.wants_lanes:
                    self._read()  # lanes may become free
            if idle:
                self.catch_up()
                self._wait_for_news(number)
            with self.lock:
                orders, more = scheduler.plan(self.version)
        except Exception:  # an exception in a callback would hang or abort the device program
            log.exception("the exchange failed; the trajectories of its shard are marked and end here")
            with self.lock:
                scheduler.abandon()
                orders, more = scheduler.plan(self.version)
        return orders, self._count(scheduler, orders, more)

    def _hear(
        self,
        scheduler: Scheduler,
        status: np.ndarray,
        stop: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        written: np.ndarray,
    ) -> None:
        """Records turns that have ended. Those that no tag ended are told so at once, and their lanes go on."""
        told: list[tuple[Scheduler, Trajectory, list[int], StopReason]] = []
        for lane in np.flatnonzero(status == Lane.STOPPED).tolist():
            trajectory, n = scheduler.lanes[lane], int(written[lane])
            if trajectory is None or trajectory.stage is not Stage.DECODING:
                continue  # seen before: it waits in its lane
            trajectory.turn_versions += [self.version] * (n - len(trajectory.turn_versions))
            trajectory.timing.decoding += time.monotonic() - trajectory.timing.begun
            turn = tokens[lane, :n].tolist()
            trajectory.wrote(turn, logprobs[lane, :n].tolist())
            trajectory.stage, reason = Stage.ENDED, StopReason(int(stop[lane]))
            tagged = reason in (StopReason.CALL, StopReason.ANSWER)
            (self._ended if tagged else told).append((scheduler, trajectory, turn, reason))
        for ended in told:
            self._read_turn(*ended)

    def _read(self) -> None:
        ended, self._ended = self._ended, []
        for turn in ended:
            self._read_turn(*turn)

    def _read_turn(self, scheduler: Scheduler, trajectory: Trajectory, turn: list[int], stop: StopReason) -> None:
        if trajectory.finished:
            return  # it was abandoned
        try:
            self._act(scheduler, trajectory, turn, stop)
        except Exception:
            self._give_up(scheduler, trajectory, "its turn could not be read")

    def _give_up(self, scheduler: Scheduler, trajectory: Trajectory, why: str) -> None:
        """Ends a trajectory by a fault of ours; the others go on."""
        log.exception("trajectory %d is marked and ends here: %s", trajectory.number, why)
        trajectory.marked = True
        scheduler.finish(trajectory)

    def _act(self, scheduler: Scheduler, trajectory: Trajectory, turn: list[int], stop: StopReason) -> None:
        """Parses a turn that has ended: a call goes out, an answer ends the episode."""
        parsed = protocol.parse_turn(self.tokens.decode(turn), stop, self.resolver, self.in_thought)
        trajectory.turns += 1
        trajectory.well_formed &= parsed.well_formed
        trajectory.closed_turn = stop is StopReason.END_OF_TURN
        trajectory.cut += stop is StopReason.BUDGET
        trajectory.malformed += parsed.status is Status.MALFORMED and stop is not StopReason.BUDGET
        trajectory.unresolved += parsed.status is Status.UNKNOWN
        if parsed.kind is protocol.TurnKind.ANSWER:
            trajectory.answer = parsed.answer
            scheduler.finish(trajectory)
        elif trajectory.turns > self.config.max_calls:
            trajectory.well_formed = False
            scheduler.finish(trajectory)
        elif parsed.call is None:
            self._deliver(scheduler, trajectory, Observation(parsed.error, parsed.status))
        else:
            trajectory.pending, trajectory.stage = parsed.call, Stage.WAITING
            self._outgoing.append((scheduler, trajectory))

    def _collect(self) -> None:
        """Takes what the experts have answered, for whichever shard."""
        unsent, self._unsent = self._unsent, []
        for ticket, observation in [*unsent, *self.dispatcher.collect()]:
            scheduler, trajectory = self._waiting.pop(ticket)
            came, body = self._replies.pop(ticket, (time.monotonic(), None))
            if trajectory.finished:
                continue  # it was abandoned
            # Until it came, not until now: the engine may have been busy, and the deadline is the experts'.
            trajectory.timing.waiting.append(came - trajectory.timing.called)
            if trajectory.pending is not None:
                trajectory.calls.append((trajectory.pending, observation))
                trajectory.pending = None
            try:
                self._deliver(scheduler, trajectory, observation, body)
            except Exception:
                self._give_up(scheduler, trajectory, "a reply could not be delivered")

    def _read_ahead(self, ticket: int, observation: Observation) -> None:
        """Encodes a reply while the device decodes. Others use the dispatcher, too: theirs is not kept."""
        if ticket in self._waiting:
            came = time.monotonic()
            self._replies[ticket] = came, self.body_ids(observation.text)

    def _deliver(
        self, scheduler: Scheduler, trajectory: Trajectory, observation: Observation, body: list[int] | None = None
    ) -> None:
        """An observation is ready to be read, or ends an episode that has no room for it."""
        trajectory.marked |= observation.status.is_infrastructure
        last = trajectory.turns >= self.config.max_calls
        ids = self._framed(self.body_ids(observation.text) if body is None else body, last)
        if trajectory.closed_turn:
            ids = ids[1:]  # the policy has closed its turn itself
        if len(trajectory.tokens) + len(ids) >= self.config.room or not self._drop_thought(trajectory, ids):
            trajectory.well_formed = False
            scheduler.finish(trajectory)
        else:
            scheduler.ready(trajectory, ids)

    def _drop_thought(self, trajectory: Trajectory, ids: list[int]) -> bool:
        """Has the last turn read again without its thought, before its observation `ids`, if thoughts are dropped.

        What stays of it is what the published Thinking template renders: the text behind the last closing tag.

        Returns:
          Whether there is room for that and for another turn.
        """
        if not self.opening_thought:
            return True
        text = self.tokens.decode(trajectory.last_turn)
        shown = text.rpartition(protocol.THINK_CLOSE)[2].lstrip("\n") if protocol.THINK_CLOSE in text else text
        again = self.tokens.encode_foreign(shown)
        full = len(trajectory.tokens) + len(ids) + self.config.turn_budget > self.config.room
        if full or len(again) > self.config.turn_budget:  # as text, ids may be read as more of them
            return False
        trajectory.again = [*again, *self.before[:1]] if trajectory.closed_turn else again
        trajectory.rewind = trajectory.turn_start
        trajectory.turn_start += len(trajectory.again) + len(ids) - len(self.opening_thought)
        return True

    def _wait_for_news(self, shard: int) -> None:
        """Returns as soon as a shard of this process has something to do in this round, or patience ends."""
        among_processes = jax.process_count() > 1
        end = time.monotonic() + (_PATIENCE_AMONG_PROCESSES if among_processes else _PATIENCE_SECONDS)
        this_round = self._rounds[shard]
        while True:
            with self.lock:
                self._collect()
                if not self.patient or self._something_to_do():
                    self._last_news = max(self._last_news, this_round)
                left = end - time.monotonic()
                if self._last_news >= this_round or left <= 0:
                    return
            # Another shard's thread may take what comes: look again soon.
            self.dispatcher.wait(left if len(self.schedulers) == 1 else min(left, 0.005))

    def _something_to_do(self) -> bool:
        shards = self.schedulers.values()
        return preemption.requested() or any(s.has_work for s in shards) or not any(s.unfinished for s in shards)

    def _count(self, scheduler: Scheduler, orders: Orders, more: bool) -> np.ndarray:
        """What decides about the next programs, in the order of `COUNTED`."""
        lanes = scheduler.capacity.lanes
        decoding = scheduler.stages().count(Stage.DECODING)
        rows = [orders.park_lanes, orders.load_lanes, orders.unload_lanes, orders.back_lanes, orders.append_lanes]
        counts = [scheduler.unfinished, decoding, len(scheduler.admitted), np.count_nonzero(orders.changed)]
        counts += [*(np.count_nonzero(x < lanes) for x in rows), int(more), scheduler.overdue]
        counts += [int(preemption.requested())]
        return np.array([*counts, scheduler.leading, len(scheduler.finished)], np.int32)

    # ---- text ----------------------------------------------------------------------------------------------

    def observation_ids(self, observation: Observation, last: bool) -> list[int]:
        """A whole user turn with the neutralised, capped observation, and the next assistant header."""
        return self._framed(self.body_ids(observation.text), last)

    def _check_filler(self) -> None:
        filled = [*self.tokens.encode(" 0"), *self.filler * 2, *self.closing]
        text = f" 0{_FILLER * 2} {protocol.OBSERVATION_CLOSE}"
        if self.config.observation_multiple > 1 and (len(self.filler) > 1 or self.tokens.encode(text) != filled):
            raise ConfigError(
                f"config.rollout.observation_multiple={self.config.observation_multiple} fills observations up with "
                f"{_FILLER!r}, which is no token of its own in this tokenizer; set it to 1, or take another tokenizer"
            )

    def _framed(self, body: list[int], last: bool) -> list[int]:
        fill = self.filler * (-len(body) % self.config.observation_multiple)
        note = self.no_calls_left if last else []
        return [*self.before, *self.opening, *body, *fill, *self.closing, *note, *self.after]

    def body_ids(self, text: str) -> list[int]:
        """Foreign text, neutralised and capped: the ids of the text that they show.

        It has its leading space, so that a quote has the same tokens.
        """
        limit = self.config.observation_tokens
        most = _LETTERS * limit
        if len(text) > 2 * most:  # megabytes would take seconds, and all but head and tail is cut anyway
            text = f"{text[:most]} ... {text[-most:]}"
        ids = shown = self._whole_ids(text)
        kept = limit
        while len(shown) > limit:  # beside a cut, text may be read as other tokens, and as more
            shown = self.tokens.encode_foreign(self.tokens.decode(protocol.cap_ids(ids, kept, self.cut)))
            kept -= 1
        return shown

    def cuts(self, text: str) -> bool:
        """Whether `body_ids` leaves out some of it."""
        limit = self.config.observation_tokens
        return len(text) > 2 * _LETTERS * limit or len(self._whole_ids(text)) > limit

    def _whole_ids(self, text: str) -> list[int]:
        return self.tokens.encode_foreign(f" {protocol.neutralise(text, self.tokens.special_texts)}")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the loop decides by, the same on every process: summed over all shards, or the least of any shard."""

    unfinished: int  # groups
    decoding: int  # lanes, once the orders are carried out
    admitted: int  # groups
    reseated: int  # lanes with another trajectory than before, or none
    parked: int
    loaded: int
    unloaded: int
    brought_back: int
    appended: int
    more: int  # shards that could order more than a program call takes
    overdue: int  # running groups that are too old to go on beyond this version
    stopped: int  # shards whose process was told to stop
    leading: int  # the least of any shard: groups that are over before the first, as submitted, that is not
    finished: int  # the least of any shard: groups that are over and not yet taken


COUNTED = tuple(field.name for field in dataclasses.fields(Counts))
_SUMMED = COUNTED.index("leading")


_KNOWN = {None: Lane.EMPTY.value} | dict.fromkeys((Stage.ENDED, Stage.WAITING, Stage.READY), Lane.WAITING.value)


def _occupation(scheduler: Scheduler, status: np.ndarray) -> np.ndarray:
    """What lanes have been doing (`Lane`, int32 `[S]`), given what the device knows of it."""
    known = [_KNOWN.get(stage, n) for stage, n in zip(scheduler.stages(), status.tolist(), strict=True)]
    return np.array(known, np.int32)


def make_exchange_program(
    exchange: Exchange, mesh: Mesh, capacity: Capacity
) -> Callable[[Lanes, Array], tuple[Orders, Array]]:
    """Compiles the exchange: `(lanes, shard numbers int32 [D]) → (orders, leading axis D, counts)`.

    Counts int32 `[len(COUNTED)]` are replicated. All processes read them, so all enqueue the same programs in the
    same order.
    """
    shards = PartitionSpec(BATCH_AXES)
    blank, fields = orders_layout(capacity)
    # One array each way: what a callback takes and gives costs time by the array.
    answer = jax.ShapeDtypeStruct((blank.size + len(COUNTED),), np.int32)

    def local(shard: Array, status: Array, *turn: Array) -> tuple[Array, Array]:
        leader = jax.lax.axis_index("tensor") == 0
        idle = jax.lax.psum(jnp.sum(status == Lane.DECODING), BATCH_AXES) == 0
        told = shard, leader.astype(jnp.int32), idle.astype(jnp.int32), status, *turn
        ends = np.cumsum([x.size for x in told]).tolist()
        layout = [(end - x.size, end, x.dtype, x.shape) for end, x in zip(ends, told, strict=True)]

        def serve(row: np.ndarray) -> np.ndarray:
            row = np.asarray(row)
            given = (row[start:end].view(dtype).reshape(shape) for start, end, dtype, shape in layout)
            orders, counts = exchange.serve(capacity, *given)
            return np.concatenate([orders.packed, counts])

        bits = [jax.lax.bitcast_convert_type(x, jnp.int32).ravel() for x in told]
        answered = jax.lax.psum(io_callback(serve, answer, jnp.concatenate(bits)), "tensor")
        packed, counts = answered[: blank.size], answered[blank.size :]
        summed, least = jax.lax.psum(counts, BATCH_AXES), jax.lax.pmin(counts, BATCH_AXES)
        return packed[None], jnp.where(np.arange(len(COUNTED)) < _SUMMED, summed, least)

    out_specs = (shards, PartitionSpec())
    compiled = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(shards,) * 6, out_specs=out_specs, check_vma=False))

    def program(lanes: Lanes, shard: Array) -> tuple[Orders, Array]:
        packed, counts = compiled(shard, lanes.status, lanes.stop, lanes.tokens, lanes.logprobs, lanes.written)
        packed_fields: dict[str, Any] = {name: PackedField(packed, *field) for name, field in fields.items()}
        return Orders(packed, **packed_fields), counts

    return program
