"""The exchange on one device and on a mesh: turns go in as tokens, observations come out as tokens."""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from maestro_jax.parallel.mesh import MeshConfig, batch_shards, make_mesh
from maestro_jax.parallel.sharding import over_groups
from maestro_jax.policy.tokens import Tokens
from maestro_jax.rollout.exchange import Counts, EpisodeConfig, Exchange, make_exchange_program
from maestro_jax.rollout.protocol import TAG_NAMES
from maestro_jax.rollout.scheduler import Capacity, Scheduler
from maestro_jax.rollout.state import Lane, Lanes
from maestro_jax.rollout.trajectory import GroupRecord, Stage, Trajectory
from maestro_jax.types import Call, Observation, Status, StopReason, Task, Usage
from tests.rollout import toy

GROUPS, MEMBERS, ROOM = 4, 2, 96
CONFIG = EpisodeConfig(
    max_calls=2, observation_tokens=12, observation_multiple=1, deadline=30.0, turn_budget=24, room=ROOM
)
MESHES = {"1 device": (1, 1, 1), "data 2, fsdp 2, tensor 2": (2, 2, 2)}
CALL_TEXT = "<search> Glyph@@Reading: look </search>"
CALL = Call("Glyph", "Reading", "look")
EVERY_LANE = list(np.ndindex(GROUPS, MEMBERS))
At = tuple[int, int]


@pytest.fixture(scope="module", params=MESHES)
def mesh(request: pytest.FixtureRequest) -> Mesh:
    axes = MESHES[request.param]
    return make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])


@pytest.fixture(scope="module")
def one_device() -> Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@dataclasses.dataclass
class Result:
    """What the program ordered, by group and member."""

    lane: np.ndarray
    observations: dict[At, list[int]]
    unfinished: int  # trajectories
    counts: Counts

    def ids(self, at: At) -> list[int]:
        return self.observations.get(at, [])


_LANE_OF = {Stage.DECODING: Lane.DECODING, Stage.WAITING: Lane.WAITING, Stage.FINISHED: Lane.EMPTY}


class Bench:
    """An exchange with its program, a desk of fake experts, and lanes written by hand (group * members + member)."""

    def __init__(self, tokens: Tokens, mesh: Mesh, desk: toy.Desk, config: EpisodeConfig = CONFIG):
        self.tokens, self.mesh, self.desk = tokens, mesh, desk
        self.exchange = Exchange(tokens, toy.Names(), desk, config)  # type: ignore[arg-type]
        self.shards = batch_shards(mesh)
        groups = GROUPS // self.shards
        self.capacity = Capacity(
            lanes=groups * MEMBERS,
            groups=groups,
            members=MEMBERS,
            room=config.room,
            pages=0,
            page=config.room,
            append_rows=groups * MEMBERS,
            prefill_groups=groups,
            observation=self.exchange.observation_bucket,
            token_bytes=1,
            host_bytes=0,
        )
        self.program = make_exchange_program(self.exchange, mesh, self.capacity)
        self.numbers = itertools.count()

    def begin(self, tasks: Sequence[Task | None] | None = None) -> None:
        """Every trajectory decodes in a lane of its own."""
        tasks = tasks or [toy.task(group) for group in range(GROUPS)]
        schedulers = {shard: Scheduler(self.capacity) for shard in range(self.shards)}
        self.records: dict[int, GroupRecord] = {}
        for index, task in enumerate(tasks):
            if task is not None:
                members = [Trajectory(task, m, next(self.numbers)) for m in range(MEMBERS)]
                self.records[index] = GroupRecord(task, index, members)
                schedulers[index * self.shards // GROUPS].submit(self.records[index])
        for scheduler in schedulers.values():
            scheduler.plan(version=0)
        self.exchange.begin(schedulers, version=0)

    def run(
        self,
        turns: Mapping[At, str],
        stop: StopReason = StopReason.CALL,
        used: int = 0,
        waiting: Sequence[At] = (),
        others: Lane = Lane.EMPTY,
    ) -> Result:
        """Lanes of `turns` have just ended them, `used` tokens into their room."""
        shape = (GROUPS, MEMBERS)
        status, written = np.full(shape, others, np.int32), np.zeros(shape, np.int32)
        tokens = np.zeros((*shape, CONFIG.turn_budget), np.int32)
        for at in waiting:
            status[at] = Lane.WAITING
        for at, text in turns.items():
            ids = self.tokens.encode(text)
            tokens[at][: len(ids)], written[at], status[at] = ids, len(ids), Lane.STOPPED
            self.trajectory(at).tokens = [0] * used
        logprobs, stops = np.full(tokens.shape, -1.0, np.float32), np.full(shape, stop, np.int32)
        arrays = {"status": status, "stop": stops, "tokens": tokens, "logprobs": logprobs, "written": written}
        over = over_groups(self.mesh)
        on_mesh = {name: jax.device_put(self._by_shard(x), over) for name, x in arrays.items()}
        lanes = Lanes(**dict.fromkeys(field.name for field in dataclasses.fields(Lanes)) | on_mesh)  # type: ignore[arg-type]
        with jax.set_mesh(self.mesh):
            orders, counts = self.program(lanes, jax.device_put(np.arange(self.shards, dtype=np.int32), over))
            given = [x.cut() for x in (orders.append_lanes, orders.observation, orders.observation_length)]
        self.exchange.catch_up()
        return self._result(*jax.device_get(given), Counts(*np.asarray(counts).tolist()))

    def _by_shard(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.shards, -1, *x.shape[2:])

    def _result(self, appended: np.ndarray, observation: np.ndarray, lengths: np.ndarray, counts: Counts) -> Result:
        told: dict[At, list[int]] = {}
        for shard, lanes in enumerate(appended):
            for row, lane in enumerate(lanes):
                if lane < self.capacity.lanes:
                    group, member = divmod(shard * self.capacity.lanes + int(lane), MEMBERS)
                    length = lengths[shard, row]
                    told[group, member] = observation[shard, row, :length].tolist()
                    assert not observation[shard, row, length:].any()
        lane = np.full((GROUPS, MEMBERS), Lane.EMPTY)
        for group, record in self.records.items():
            lane[group] = [_LANE_OF[member.stage] for member in record.members]
        unfinished = sum(not member.finished for record in self.records.values() for member in record.members)
        return Result(lane, told, unfinished, counts)

    def trajectory(self, at: At) -> Trajectory:
        return self.records[at[0]].members[at[1]]


def says(text: str, status: Status = Status.OK, price: float = 0.0) -> toy.Desk:
    return toy.Desk(lambda call: Observation(text, status, 0.5, Usage(price=price)))


@pytest.fixture
def bench(toy_tokens: Tokens, mesh: Mesh) -> Bench:
    made = Bench(toy_tokens, mesh, says("seven", price=0.25))
    made.begin()
    return made


def quick(tokens: Tokens, mesh: Mesh, desk: toy.Desk, config: EpisodeConfig = CONFIG) -> Bench:
    made = Bench(tokens, mesh, desk, config)
    made.begin()
    return made


# ---- calls and observations, on every mesh -----------------------------------------------------------------


def test_every_call_goes_out_once_with_its_own_task(bench: Bench) -> None:
    bench.run(dict.fromkeys(EVERY_LANE, CALL_TEXT))
    assert len({ticket for ticket, *_ in bench.desk.submitted}) == len(bench.desk.submitted) == GROUPS * MEMBERS
    asked = sorted((question, images) for _, _, question, images, _ in bench.desk.submitted)
    tasks = [toy.task(group) for group in range(GROUPS) for _ in range(MEMBERS)]
    assert asked == sorted((task.question, task.images) for task in tasks)
    assert all(call == CALL and 0 < deadline <= CONFIG.deadline for _, call, _, _, deadline in bench.desk.submitted)


def test_observations_arrive_in_their_lanes_with_exact_ids(toy_tokens: Tokens, mesh: Mesh) -> None:
    bench = quick(toy_tokens, mesh, toy.Desk(lambda call: Observation(call.query * 2, Status.OK)))
    turns = {at: f"<search> Glyph@@Reading: look {n} </search>" for n, at in enumerate(EVERY_LANE)}
    found = bench.run(turns)
    assert (found.lane == Lane.DECODING).all()
    assert (found.unfinished, found.counts.appended) == (len(turns), len(turns))
    for n, at in enumerate(EVERY_LANE):
        wanted = bench.exchange.observation_ids(Observation(f"look {n}look {n}", Status.OK), last=False)
        assert found.ids(at) == wanted


def test_a_lane_that_waits_is_not_asked_again_and_gets_its_reply_later(toy_tokens: Tokens, mesh: Mesh) -> None:
    bench = quick(toy_tokens, mesh, toy.Desk())
    at = (3, 1)
    first = bench.run({at: CALL_TEXT}, others=Lane.DECODING)
    assert first.lane[at] == Lane.WAITING
    assert (first.unfinished, first.counts.appended) == (GROUPS * MEMBERS, 0)
    bench.desk.ready.append((bench.desk.submitted[0][0], Observation("seven", Status.OK)))
    second = bench.run({}, waiting=[at])
    assert len(bench.desk.submitted) == 1
    assert list(second.observations) == [at] and second.lane[at] == Lane.DECODING
    assert second.ids(at) == bench.exchange.observation_ids(Observation("seven", Status.OK), last=False)


def test_an_answer_ends_the_episode(bench: Bench) -> None:
    found = bench.run({(2, 0): "<answer> seven </answer>"}, StopReason.ANSWER, others=Lane.DECODING)
    assert found.lane[2, 0] == Lane.EMPTY
    assert (found.unfinished, found.counts.appended) == (GROUPS * MEMBERS - 1, 0)
    trajectory = bench.trajectory((2, 0))
    assert (trajectory.answer, trajectory.finished, trajectory.well_formed, trajectory.marked) == (
        "seven",
        True,
        True,
        False,
    )


def test_a_call_that_cannot_be_sent_is_a_failure_of_the_infrastructure(toy_tokens: Tokens, mesh: Mesh) -> None:
    desk = toy.Desk()
    bench = quick(toy_tokens, mesh, desk)

    def broken(*args: object) -> None:
        raise OSError("no more threads")

    desk.submit = broken  # type: ignore[method-assign]
    found = bench.run(dict.fromkeys(EVERY_LANE, CALL_TEXT))
    assert (found.lane == Lane.DECODING).all() and found.counts.appended == len(EVERY_LANE)
    for at in EVERY_LANE:
        ((call, observation),) = bench.trajectory(at).calls
        assert (call, observation.status, bench.trajectory(at).marked) == (CALL, Status.UNAVAILABLE, True)


def test_calls_leave_when_the_device_has_work_again(toy_tokens: Tokens, one_device: Mesh) -> None:
    """Whatever sends them competes for the interpreter with what the device waits for."""
    bench, sent = quick(toy_tokens, one_device, toy.Desk()), []
    catch_up = bench.exchange.catch_up
    bench.exchange.catch_up = lambda: sent.append(len(bench.desk.submitted)) or catch_up()  # type: ignore[method-assign,func-returns-value]
    bench.run({(0, 0): CALL_TEXT}, others=Lane.DECODING)
    assert sent == [0] and len(bench.desk.submitted) == 1
    bench.run({(0, 1): CALL_TEXT})  # no lane decodes: they leave before the callback waits for replies
    assert sent == [0, 1, 2]


def test_a_turn_that_no_tag_ended_is_told_so_at_once(toy_tokens: Tokens, one_device: Mesh) -> None:
    """Its lane goes on with the others' next chunk."""
    bench = quick(toy_tokens, one_device, toy.Desk())
    found = bench.run({(0, 0): "I am lost."}, StopReason.END_OF_TURN, others=Lane.DECODING)
    assert found.counts.appended == 1 and found.lane[0, 0] == Lane.DECODING


def test_a_reply_that_cannot_be_delivered_ends_its_own_episode_only(toy_tokens: Tokens, mesh: Mesh) -> None:
    bench = quick(toy_tokens, mesh, toy.Desk(lambda call: Observation(call.query, Status.OK)))
    deliver = bench.exchange._deliver

    def broken(scheduler: Scheduler, trajectory: Trajectory, observation: Observation, *body: list[int]) -> None:
        if observation.text == "look 3":
            raise RuntimeError("a bug")
        deliver(scheduler, trajectory, observation, *body)

    bench.exchange._deliver = broken  # type: ignore[method-assign]
    found = bench.run({at: f"<search> Glyph@@Reading: look {n} </search>" for n, at in enumerate(EVERY_LANE)})
    marked = [bench.trajectory(at).marked for at in EVERY_LANE]
    assert marked == [n == 3 for n in range(len(EVERY_LANE))]
    assert found.counts.appended == len(EVERY_LANE) - 1 and found.unfinished == len(EVERY_LANE) - 1


def test_replies_to_others_are_not_kept(toy_tokens: Tokens, one_device: Mesh) -> None:
    """Baselines and demonstrations use the same dispatcher, with tickets of their own."""
    bench = quick(toy_tokens, one_device, toy.Desk())
    bench.desk.reader(7, Observation("seven", Status.OK))  # type: ignore[attr-defined]
    assert not bench.exchange._replies


def test_only_the_experts_seconds_count_against_the_deadline(toy_tokens: Tokens, one_device: Mesh) -> None:
    """The engine may be busy with an update when the reply comes."""
    bench = quick(toy_tokens, one_device, toy.Desk())
    bench.run({(0, 0): CALL_TEXT}, others=Lane.DECODING)
    reply = bench.desk.submitted[0][0], Observation("seven", Status.OK)
    bench.desk.reader(*reply)  # type: ignore[attr-defined]
    time.sleep(0.3)
    bench.desk.ready.append(reply)
    bench.run({}, waiting=[(0, 0)])
    assert bench.trajectory((0, 0)).timing.waiting[0] < 0.2


def test_megabytes_of_a_reply_are_cut_before_they_are_encoded(
    toy_tokens: Tokens, one_device: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, encoded = quick(toy_tokens, one_device, toy.Desk()).exchange, []
    text = "one two " + "three " * 100_000 + "four five"
    encode = Tokens.encode_foreign
    monkeypatch.setattr(Tokens, "encode_foreign", lambda self, t: encoded.append(len(t)) or encode(self, t))
    found = exchange.body_ids(text)
    assert encoded[0] < 5000 and len(found) == CONFIG.observation_tokens
    said = toy_tokens.decode(found)
    assert said.startswith(" one") and said.endswith("five")


def test_an_exception_ends_the_lanes_as_marked(toy_tokens: Tokens, mesh: Mesh) -> None:
    desk = toy.Desk()
    bench = quick(toy_tokens, mesh, desk)
    desk.collect = None  # type: ignore[assignment,method-assign]
    found = bench.run(dict.fromkeys(EVERY_LANE, CALL_TEXT))
    assert (found.lane == Lane.EMPTY).all() and found.counts.reseated == len(EVERY_LANE)
    assert found.unfinished == 0
    assert all(bench.trajectory(at).marked and bench.trajectory(at).finished for at in EVERY_LANE)


def test_a_call_of_an_abandoned_episode_is_not_sent(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = quick(toy_tokens, one_device, toy.Desk())
    bench.run({(0, 0): "<answer> seven </answer>"}, StopReason.ANSWER, others=Lane.DECODING)
    bench.exchange._outgoing.append((bench.exchange.schedulers[0], bench.trajectory((0, 1))))
    bench.exchange.schedulers[0].abandon()
    bench.exchange.catch_up()
    assert not bench.desk.submitted and not bench.exchange._waiting and not bench.exchange._outgoing


def test_an_episode_that_was_over_is_not_marked_by_a_later_exception(toy_tokens: Tokens, one_device: Mesh) -> None:
    desk = toy.Desk()
    bench = quick(toy_tokens, one_device, desk)
    bench.run({(0, 0): "<answer> seven </answer>"}, StopReason.ANSWER, others=Lane.DECODING)
    desk.collect = None  # type: ignore[assignment,method-assign]
    bench.run({}, others=Lane.DECODING)
    assert not bench.trajectory((0, 0)).marked
    assert bench.trajectory((0, 1)).marked


# ---- the rules of an episode -------------------------------------------------------------------------------


def test_a_call_is_recorded_with_its_observation(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = quick(toy_tokens, one_device, says("seven", price=0.25))
    bench.run({(1, 0): CALL_TEXT}, used=10)
    trajectory = bench.trajectory((1, 0))
    assert trajectory.calls == [(CALL, Observation("seven", Status.OK, 0.5, Usage(price=0.25)))]
    assert (trajectory.executed_calls, trajectory.price, trajectory.well_formed) == (1, 0.25, True)


@pytest.mark.parametrize(
    ("text", "stop", "says"),
    [
        ("seven", StopReason.END_OF_TURN, "Nothing to do"),
        ("<search> Glyph Reading look </search>", StopReason.CALL, "Malformed call"),
        ("<answer> a <search> b </search>", StopReason.CALL, "exactly one"),
        ("<search> Glyph@@Reading: look", StopReason.BUDGET, "too long"),
        ("<search> Nobody@@Reading: look </search>", StopReason.CALL, "Unknown: Nobody"),
    ],
)
def test_a_bad_turn_is_told_so_and_costs_the_format(
    text: str, stop: StopReason, says: str, toy_tokens: Tokens, one_device: Mesh
) -> None:
    config = dataclasses.replace(CONFIG, observation_tokens=80, room=1000)
    bench = quick(toy_tokens, one_device, toy.Desk(), config)
    found = bench.run({(0, 1): text}, stop)
    assert found.lane[0, 1] == Lane.DECODING
    assert says in bench.tokens.decode(found.ids((0, 1)))
    trajectory = bench.trajectory((0, 1))
    assert (trajectory.well_formed, trajectory.marked, trajectory.calls) == (False, False, [])
    assert not bench.desk.submitted


@pytest.mark.parametrize(
    ("text", "stop", "counted"),
    [
        ("seven", StopReason.END_OF_TURN, (1, 0, 0)),
        ("<search> Glyph Reading look </search>", StopReason.CALL, (1, 0, 0)),
        ("<search> Nobody@@Reading: look </search>", StopReason.CALL, (0, 1, 0)),
        ("<search> Glyph@@Reading: look", StopReason.BUDGET, (0, 0, 1)),
        (CALL_TEXT, StopReason.CALL, (0, 0, 0)),
        ("<answer> a </answer>", StopReason.ANSWER, (0, 0, 0)),
    ],
)
def test_a_bad_turn_is_counted_by_what_is_wrong_with_it(
    text: str, stop: StopReason, counted: tuple[int, int, int], toy_tokens: Tokens, one_device: Mesh
) -> None:
    bench = quick(toy_tokens, one_device, says("seven"))
    bench.run({(0, 1): text}, stop)
    trajectory = bench.trajectory((0, 1))
    assert (trajectory.malformed, trajectory.unresolved, trajectory.cut) == counted


def test_after_the_last_call_the_policy_is_told_to_answer_and_may_only_answer(
    toy_tokens: Tokens, one_device: Mesh
) -> None:
    bench = quick(toy_tokens, one_device, says("seven"))
    at = (0, 0)
    told = [bench.run({at: CALL_TEXT}).ids(at) for _ in range(CONFIG.max_calls)]
    assert told == [
        bench.exchange.observation_ids(Observation("seven", Status.OK), last=last) for last in (False, True)
    ]
    assert ["answer now" in bench.tokens.decode(ids).lower() for ids in told] == [False, True]
    found = bench.run({at: CALL_TEXT})
    assert found.lane[at] == Lane.EMPTY
    trajectory = bench.trajectory(at)
    assert (len(trajectory.calls), len(bench.desk.submitted)) == (CONFIG.max_calls, CONFIG.max_calls)
    assert (trajectory.well_formed, trajectory.answer, trajectory.finished) == (False, None, True)


def test_malformed_turns_use_up_the_budget_too(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = quick(toy_tokens, one_device, toy.Desk())
    lanes = [bench.run({(0, 0): "seven"}).lane[0, 0] for _ in range(CONFIG.max_calls + 1)]
    assert lanes == [Lane.DECODING] * CONFIG.max_calls + [Lane.EMPTY]


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.UNAVAILABLE])
def test_a_failure_of_the_infrastructure_marks_the_trajectory(
    status: Status, toy_tokens: Tokens, one_device: Mesh
) -> None:
    bench = quick(toy_tokens, one_device, says("Gone.", status))
    found = bench.run({(0, 0): CALL_TEXT})
    trajectory = bench.trajectory((0, 0))
    assert (trajectory.marked, trajectory.well_formed, trajectory.executed_calls) == (True, True, 0)
    assert " Gone. " in bench.tokens.decode(found.ids((0, 0)))
    assert not bench.trajectory((0, 1)).marked


def test_a_late_reply_to_an_older_rollout_is_dropped(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = quick(toy_tokens, one_device, toy.Desk())
    bench.run({(0, 0): CALL_TEXT}, others=Lane.DECODING)
    bench.begin()
    bench.run({(0, 0): CALL_TEXT}, others=Lane.DECODING)
    (old, *_), (new, *_) = bench.desk.submitted
    bench.desk.ready.append((old, Observation("old", Status.OK)))
    still = bench.run({(1, 1): "<answer> x </answer>"}, others=Lane.DECODING)
    assert (old != new, still.counts.appended) == (True, 0)
    bench.desk.ready.append((new, Observation("new", Status.OK)))
    found = bench.run({}, waiting=[(0, 0)])
    assert found.ids((0, 0)) == bench.exchange.observation_ids(Observation("new", Status.OK), last=False)
    assert [observation.text for _, observation in bench.trajectory((0, 0)).calls] == ["new"]


def test_an_observation_without_room_ends_the_episode(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = quick(toy_tokens, one_device, says("seven"))
    needed = len(toy_tokens.encode(CALL_TEXT)) + len(
        bench.exchange.observation_ids(Observation("seven", Status.OK), last=False)
    )
    fits = bench.run({(0, 0): CALL_TEXT}, used=ROOM - needed - 1)
    full = bench.run({(0, 1): CALL_TEXT}, used=ROOM - needed)
    assert (fits.lane[0, 0], full.lane[0, 1]) == (Lane.DECODING, Lane.EMPTY)
    assert full.counts.appended == 0
    trajectory = bench.trajectory((0, 1))
    assert (trajectory.well_formed, trajectory.marked, trajectory.finished) == (False, False, True)


def test_padding_groups_have_no_trajectory(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = Bench(toy_tokens, one_device, says("seven"))
    bench.begin([toy.task(0), toy.task(1), None, None])
    found = bench.run({(0, 0): CALL_TEXT, (1, 1): CALL_TEXT})
    assert found.counts.appended == 2
    assert found.unfinished == 4 and found.counts.unfinished == 2


# ---- what an observation looks like ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exchange(toy_tokens: Tokens) -> Exchange:
    return Exchange(toy_tokens, toy.Names(), toy.Desk(), CONFIG)  # type: ignore[arg-type]


def plain_text(exchange: Exchange, ids: Sequence[int]) -> str:
    return exchange.tokens.tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]


def test_an_observation_is_a_proper_user_turn(exchange: Exchange) -> None:
    messages = [
        {"role": "assistant", "content": "<search> ... </search>"},
        {"role": "user", "content": "<information> seven </information>"},
    ]
    template = exchange.tokens.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = exchange.observation_ids(Observation("seven", Status.OK), last=False)
    assert plain_text(exchange, ids) == template.partition("</search>")[2]


def test_a_turn_that_closed_itself_is_not_closed_again(toy_tokens: Tokens, one_device: Mesh) -> None:
    bench = quick(toy_tokens, one_device, toy.Desk())
    open_ended, closed = "I am lost.", "I am lost.<|im_end|>"
    for at, text, stop in (((0, 0), open_ended, StopReason.BUDGET), ((0, 1), closed, StopReason.END_OF_TURN)):
        found = bench.run({at: text}, stop)
        whole = plain_text(bench.exchange, [*toy_tokens.encode(text), *found.ids(at)])
        assert whole.startswith("I am lost.<|im_end|>\n<|im_start|>user\n<information>")


def test_an_answer_that_quotes_uses_the_tokens_that_were_read(exchange: Exchange) -> None:
    ids = exchange.observation_ids(Observation("seven", Status.OK), last=False)
    quoted = exchange.tokens.encode(" seven")
    answer = exchange.tokens.encode("<answer> seven </answer>")
    assert any(ids[i : i + len(quoted)] == quoted for i in range(len(ids)))
    assert any(answer[i : i + len(quoted)] == quoted for i in range(len(answer)))


def test_a_long_observation_keeps_head_and_tail(exchange: Exchange) -> None:
    text = " ".join(str(n) for n in range(1000))
    ids = exchange.observation_ids(Observation(text, Status.OK), last=True)
    body = plain_text(exchange, ids).partition("<information>")[2].partition("</information>")[0]
    assert body.startswith(" 0 1") and body.endswith("999 ") and " ..." in body
    assert len(ids) <= exchange.observation_bucket


@pytest.mark.parametrize("words", [0, 1, 4, 5, 6, 500])
def test_a_filled_observation_has_a_multiple_of_tokens(words: int, toy_tokens: Tokens, exchange: Exchange) -> None:
    config = dataclasses.replace(CONFIG, observation_multiple=5)
    filled = Exchange(toy_tokens, toy.Names(), toy.Desk(), config)  # type: ignore[arg-type]
    reply = Observation(" ".join(["seven"] * words), Status.OK)
    plain, ids = (e.observation_ids(reply, last=True) for e in (exchange, filled))
    frame = len(plain) - len(exchange.body_ids(reply.text))
    assert (len(ids) - frame) % 5 == 0 and 0 <= len(ids) - len(plain) < 5
    assert plain_text(filled, ids).replace(" .", "") == plain_text(exchange, plain).replace(" .", "")
    assert len(ids) <= filled.observation_bucket


SPECIALS = ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>")
HOSTILE = st.sampled_from(
    [f"<{slash}{name}>" for name in TAG_NAMES for slash in ("", "/")]
    + [*SPECIALS, "<", ">", "</", "<|", "|>", "im_end", "\n", "assistant\n", " ", "</ANSWER >", "\x00", "é", "‹"]
)
TEXTS = st.lists(st.one_of(HOSTILE, st.text(max_size=5)), max_size=14).map("".join)


@given(text=TEXTS, last=st.booleans())
def test_no_text_can_forge_tags_or_turns(exchange: Exchange, text: str, last: bool) -> None:
    ids = exchange.observation_ids(Observation(text, Status.OK), last)
    before, after = exchange.before, exchange.after
    assert ids[: len(before)] == before and ids[-len(after) :] == after
    assert not exchange.tokens.special_ids.intersection(ids[len(before) : -len(after)])
    shown = plain_text(exchange, ids)
    assert {tag: shown.count(tag) for tag in ("<information>", "</information>")} == {
        "<information>": 1,
        "</information>": 1,
    }
    assert not any(tag in shown for tag in ("<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>"))
    assert len(ids) <= exchange.observation_bucket
