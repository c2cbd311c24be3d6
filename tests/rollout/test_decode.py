"""Cached, chunked decoding of many lanes against a plain loop that runs the whole sequence anew for every token."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch, member_logprobs
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import over_groups, replicated
from maestro_jax.policy.model import PrefixBatch, prompt_shardings
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import DecodeConfig, StopTables
from maestro_jax.rollout.moves import LaneStarts
from maestro_jax.rollout.programs import RolloutPrograms, Weights, rollout_programs
from maestro_jax.rollout.state import Groups, Lane, Lanes, RolloutSizes
from maestro_jax.types import StopReason
from tests.rollout import toy

GROUPS, MEMBERS, ROOM, WIDTH = 3, 4, 24, 5  # WIDTH: the longest observation
CHUNK, BUDGET, TURNS, TEMPERATURE = 16, 7, 3, 0.8
ROWS = 3  # observations per program call
TOLERANCE = 2e-5  # fp32; a cache and chunks change the order of sums, nothing else
END_OF_TURN = 290

# Every fifth id opens a tag that every fifth other one completes, so random tokens stop now and then.
PIECES = {0: b"</search", 1: b"> and", 2: b"</answer", 3: b"x"}
TOKEN_BYTES = [b"</answer>" if i % 20 == 4 else PIECES.get(i % 5, b"y") for i in range(toy.VOCABULARY)]
GRAPH, PARAMS = nnx.split(toy.policy(), nnx.Param)
WEIGHTS = Weights.of(PARAMS)


def stop_tables(token_bytes: list[bytes] = TOKEN_BYTES, end_of_turn: int = END_OF_TURN) -> StopTables:
    return StopTables(*build_automaton(token_bytes), np.int32(end_of_turn))


def observation(number: int, turn: int) -> list[int]:
    """What episode number `number` is told after turn `turn`: 1 to WIDTH ids."""
    rng = np.random.default_rng((number, turn))
    return rng.integers(0, 280, 1 + (number + 2 * turn) % WIDTH).tolist()


def sizes(groups: int = GROUPS, shards: int = 1, pages: int = 0) -> RolloutSizes:
    """A lane for every member."""
    return RolloutSizes(
        shards=shards,
        lanes=groups * MEMBERS,
        groups=groups,
        members=MEMBERS,
        prefix=24,
        room=ROOM,
        turn_budget=BUDGET,
        pages=pages,
        append_rows=ROWS,
        prefill_groups=groups,
    )


@functools.cache
def programs(sizes: RolloutSizes, chunk: int) -> RolloutPrograms:
    return rollout_programs(GRAPH, sizes, DecodeConfig(chunk, TEMPERATURE))


@dataclasses.dataclass
class Episode:
    """What one member wrote and was told, and the rules by which it goes on."""

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    authored: list[bool] = dataclasses.field(default_factory=list)
    turn_start: int = 0
    stops: list[StopReason] = dataclasses.field(default_factory=list)
    done: bool = False

    def write(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.authored += [True] * len(tokens)

    def end_turn(self, stop: StopReason) -> list[int]:
        """What it is told now; nothing if it is over."""
        ids = observation(self.number, len(self.stops))
        self.stops.append(stop)
        if stop is StopReason.ANSWER or len(self.stops) == TURNS or len(self.tokens) + len(ids) >= ROOM:
            self.done = True
            return []
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)
        self.authored += [False] * len(ids)
        self.turn_start = len(self.tokens)
        return ids


# ---- the two ways ------------------------------------------------------------------------------------------


def device_episodes(
    prompts: PrefixBatch,
    keys: np.ndarray,
    numbers: np.ndarray,
    noise: float,
    chunk: int = CHUNK,
    tables: StopTables | None = None,
    patience: Callable[[int, int], int] = lambda number, turn: 0,
    left_behind: float = 0.0,
) -> list[list[Episode]]:
    """Decodes as a session does; episode `numbers [B, G]` is told something `patience` rounds after its turn.

    `left_behind` stands in every lane's cache before the episodes begin.
    """
    run, tables = programs(sizes(len(keys)), chunk), tables or stop_tables()
    groups, lanes = assigned(run, prompts, keys)
    lanes = dataclasses.replace(lanes, cache=jax.tree.map(lambda x: x + left_behind, lanes.cache))
    episodes = [Episode(int(number)) for number in numbers.ravel()]  # by lane
    told: dict[int, tuple[int, list[int]]] = {}  # by lane: how many rounds from now, and what
    while not all(episode.done for episode in episodes):
        lanes = run.decode(WEIGHTS, groups, lanes, tables, np.float32(noise))
        status, stop, tokens, logprobs, written = jax.device_get(
            [x[0] for x in (lanes.status, lanes.stop, lanes.tokens, lanes.logprobs, lanes.written)]
        )
        told = {lane: (rounds - 1, ids) for lane, (rounds, ids) in told.items()}
        for lane in np.flatnonzero(status == Lane.STOPPED).tolist():
            episode, n = episodes[lane], written[lane]
            episode.write(tokens[lane, :n].tolist(), logprobs[lane, :n].tolist())
            rounds = patience(episode.number, len(episode.stops))
            told[lane] = rounds, episode.end_turn(StopReason(int(stop[lane])))
        over = np.array([[episode.done for episode in episodes]])
        lanes = run.assign(groups, lanes, starts(changed=over))
        due = [lane for lane, (rounds, ids) in told.items() if rounds <= 0 and ids]
        for few in (due[at : at + ROWS] for at in range(0, len(due), ROWS)):
            lanes = run.append(
                WEIGHTS, groups, lanes, *appended(few, [told.pop(lane)[1] for lane in few], len(episodes))
            )
    return [episodes[at : at + MEMBERS] for at in range(0, len(episodes), MEMBERS)]


def assigned(run: RolloutPrograms, prompts: PrefixBatch, keys: np.ndarray) -> tuple[Groups, Lanes]:
    """Prefilled groups whose members have a lane each, in their order."""
    groups, lanes, _ = run.open(PARAMS, prompts.root)
    groups = run.prefill(PARAMS, groups, prompts, np.arange(len(keys))[None])
    everyone = np.ones((1, keys[..., 0].size), np.int32)
    return groups, run.assign(groups, lanes, starts(everyone, status=everyone, keys=keys.reshape(1, -1, 2)))


def starts(
    changed: np.ndarray,
    status: np.ndarray | None = None,
    keys: np.ndarray | None = None,
) -> LaneStarts:
    """Lane n is that of member n; without a status it is emptied."""
    nothing, lanes = np.zeros(changed.shape, np.int32), changed.shape[1]
    return LaneStarts(
        changed=np.asarray(changed, np.int32),
        status=nothing if status is None else status,
        member_slot=np.full(changed.shape, lanes) if status is None else np.arange(lanes)[None],
        length=nothing,
        turn=nothing,
        keys=np.zeros((*changed.shape, 2), np.uint32) if keys is None else keys,
    )


def appended(lanes: Sequence[int], told: Sequence[list[int]], none: int) -> tuple[np.ndarray, ...]:
    """Lanes, ids and lengths `[1, A, ...]`, filled up with rows for lane `none`."""
    at, ids, length = np.full((1, ROWS), none), np.zeros((1, ROWS, WIDTH), np.int32), np.zeros((1, ROWS), np.int32)
    for row, (lane, words) in enumerate(zip(lanes, told, strict=True)):
        at[0, row], ids[0, row, : len(words)], length[0, row] = lane, words, len(words)
    return at, ids, length


TAGS = {b"</search>": StopReason.CALL, b"</answer>": StopReason.ANSWER}


def why_to_stop(turn: list[int], room: int) -> StopReason:
    """By the text of a turn so far, of which `room` tokens are the most."""
    text = b"".join(TOKEN_BYTES[i] for i in turn)
    ends = {text.find(tag): why for tag, why in TAGS.items() if tag in text}
    if turn[-1] == END_OF_TURN:
        return StopReason.END_OF_TURN
    if ends:
        return ends[min(ends)]
    return StopReason.BUDGET if len(turn) == min(BUDGET, room) else StopReason.NONE


@jax.jit
def full_logits(params: nnx.State, prompts: PrefixBatch, tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Next-token logits `[B, G, V]` of whole sequences, with nothing kept from one call to the next."""
    policy = nnx.merge(GRAPH, params)
    last, hidden = policy.encode_groups(prompts, tokens, length)
    index = jnp.maximum(length - 1, 0)[..., None, None]
    newest = jnp.take_along_axis(hidden, index, axis=2)[:, :, 0]
    return policy.logits(jnp.where((length > 0)[..., None], newest, last[:, None])) / TEMPERATURE


def plain_episodes(prompts: PrefixBatch, keys: np.ndarray, noise: float) -> list[list[Episode]]:
    members = range(keys.shape[1])
    episodes = [[Episode(number=b * keys.shape[1] + g) for g in members] for b in range(len(keys))]
    while not all(episode.done for group in episodes for episode in group):
        tokens = np.array([[e.tokens + [0] * (ROOM - len(e.tokens)) for e in group] for group in episodes])
        length = np.array([[len(episode.tokens) for episode in group] for group in episodes], np.int32)
        logits = np.asarray(full_logits(PARAMS, prompts, tokens.astype(np.int32), length))
        for b, g in np.ndindex(keys.shape[:2]):
            episode = episodes[b][g]
            if episode.done:
                continue
            key = jax.random.wrap_key_data(keys[b, g], impl="threefry2x32")
            position = len(episode.tokens) - episode.turn_start
            key = jax.random.fold_in(jax.random.fold_in(key, len(episode.stops)), position)
            drawn = np.asarray(jax.random.gumbel(key, (toy.VOCABULARY,), jnp.float32))
            row = logits[b, g]
            token = int(np.argmax(row + noise * drawn))
            episode.write([token], [float(row[token] - np.logaddexp.reduce(row.astype(np.float64)))])
            stop = why_to_stop(episode.tokens[episode.turn_start :], ROOM - episode.turn_start)
            if stop:
                episode.end_turn(stop)
    return episodes


# ---- fixtures ----------------------------------------------------------------------------------------------

NUMBERS = np.arange(GROUPS * MEMBERS).reshape(GROUPS, MEMBERS)
KEYS = toy.lanes((GROUPS, MEMBERS))


@functools.cache
def sampled_in_chunks(chunk: int) -> list[list[Episode]]:
    return device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, chunk)


@pytest.fixture(scope="module")
def sampled() -> list[list[Episode]]:
    return sampled_in_chunks(CHUNK)


@pytest.fixture(scope="module")
def plainly_sampled() -> list[list[Episode]]:
    return plain_episodes(toy.prompts(), KEYS, noise=1.0)


def assert_same(found: Episode, wanted: Episode, tolerance: float) -> None:
    assert dataclasses.replace(found, logprobs=[]) == dataclasses.replace(wanted, logprobs=[])
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=tolerance, rtol=0)


def assert_all_same(found: list[list[Episode]], wanted: list[list[Episode]], tolerance: float) -> None:
    for found_row, wanted_row in zip(found, wanted, strict=True):
        for one, other in zip(found_row, wanted_row, strict=True):
            assert_same(one, other, tolerance)


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["greedy", "sampled"])
def test_tokens_and_logprobs_are_those_of_a_plain_loop(
    noise: float, sampled: list[list[Episode]], plainly_sampled: list[list[Episode]]
) -> None:
    found = sampled if noise else device_episodes(toy.prompts(), KEYS, NUMBERS, noise)
    wanted = plainly_sampled if noise else plain_episodes(toy.prompts(), KEYS, noise)
    assert_all_same(found, wanted, TOLERANCE)


def test_the_comparison_covers_every_way_to_stop(plainly_sampled: list[list[Episode]]) -> None:
    seen = {stop for group in plainly_sampled for episode in group for stop in episode.stops}
    assert {StopReason.CALL, StopReason.ANSWER, StopReason.BUDGET} <= seen
    assert {len(episode.stops) for group in plainly_sampled for episode in group} >= {1, TURNS}


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing_but_the_order_of_sums(chunk: int, sampled: list[list[Episode]]) -> None:
    assert_all_same(sampled_in_chunks(chunk), sampled, TOLERANCE)


def test_waiting_changes_nothing() -> None:
    patience = lambda number, turn: (number * 3 + turn) % 4  # noqa: E731
    found = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, chunk=3, patience=patience)
    assert_all_same(found, sampled_in_chunks(3), tolerance=0)


def test_neighbours_change_nothing(sampled: list[list[Episode]]) -> None:
    keys, numbers = KEYS.copy(), NUMBERS.copy()
    others = [(0, 1), (1, 0), (2, 0), (2, 3)]
    for at in others:
        keys[at], numbers[at] = keys[at] ^ 1, 100 + numbers[at]
    found = device_episodes(toy.prompts(), keys, numbers, 1.0)
    for b, g in np.ndindex(NUMBERS.shape):
        if (b, g) not in others:
            assert_same(found[b][g], sampled[b][g], tolerance=0)
    assert found[0][1].tokens != sampled[0][1].tokens


def test_what_an_earlier_trajectory_left_in_a_lane_changes_nothing(sampled: list[list[Episode]]) -> None:
    found = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, left_behind=np.nan)
    assert_all_same(found, sampled, tolerance=0)


def test_what_stands_on_padding_of_a_prompt_is_not_stored() -> None:
    """Neither its numbers, which are NaN here, nor what they would make of the tokens beside them."""
    run, prompts = programs(sizes(), CHUNK), toy.prompts()
    spare = toy.VOCABULARY - 1
    tokens = jnp.where(prompts.mask, prompts.tokens, spare)
    assert not prompts.mask.all() and not (prompts.tokens == spare).any()

    def prefilled(row: float) -> Groups:
        params = jax.tree.map(lambda x: x, PARAMS)
        table = params["language_model"]["embed_tokens"]["embedding"]
        params["language_model"]["embed_tokens"]["embedding"] = table.replace(table[...].at[spare].set(row))
        groups, _, _ = run.open(params, prompts.root)
        return run.prefill(params, groups, dataclasses.replace(prompts, tokens=tokens), np.arange(GROUPS)[None])

    found, wanted = prefilled(np.nan), prefilled(1.0)
    np.testing.assert_array_equal(found.hidden, wanted.hidden)
    assert np.isfinite(found.hidden).all()
    for mine, theirs in zip(found.shared.values, wanted.shared.values, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert not np.asarray(mine)[~np.broadcast_to(found.shared.mask[:, :, None, :, None], mine.shape)].any()


SWAPPED = [[(2, m) for m in (3, 0, 1, 2)], [(2, m) for m in (0, 2, 1, 3)], [(0, m) for m in (1, 3, 2, 0)]]
ALONE = [[(1, 1), (1, 3), (1, 0), (1, 2)]]


@pytest.mark.parametrize(("groups", "places"), [((1,), ALONE), ((2, 2, 0), SWAPPED)], ids=["alone", "rearranged"])
def test_the_arrangement_in_groups_changes_nothing(
    groups: tuple[int, ...], places: list[list[tuple[int, int]]], sampled: list[list[Episode]]
) -> None:
    keys = np.array([[KEYS[at] for at in row] for row in places])
    numbers = np.array([[NUMBERS[at] for at in row] for row in places])
    found = device_episodes(toy.prompts(groups), keys, numbers, 1.0)
    assert_all_same(found, [[sampled[b][g] for b, g in row] for row in places], TOLERANCE)


def test_logprobs_are_those_of_the_training_forward(sampled: list[list[Episode]]) -> None:
    tokens, authored = np.zeros((GROUPS, MEMBERS, ROOM), np.int32), np.zeros((GROUPS, MEMBERS, ROOM), bool)
    length = np.array([[len(episode.tokens) for episode in group] for group in sampled], np.int32)
    wanted = np.zeros(tokens.shape, np.float32)
    for at in np.ndindex(length.shape):
        episode, n = sampled[at[0]][at[1]], length[at]
        tokens[at][:n], authored[at][:n], wanted[at][:n] = episode.tokens, episode.authored, episode.logprobs
    zeros = np.zeros(tokens.shape, np.float32)
    arrays = (tokens, length, authored, zeros, zeros, zeros[..., 0], loss_rows(authored))
    batch = GroupBatch(toy.prompts(), *map(jnp.asarray, arrays))
    logprobs, _ = jax.jit(
        lambda params: member_logprobs(nnx.merge(GRAPH, params), batch, TEMPERATURE, chunk=toy.VOCABULARY // 3)
    )(PARAMS)
    assert np.abs(np.asarray(logprobs) - wanted)[authored].max() <= TOLERANCE


def test_a_turn_ends_at_its_budget_and_the_last_one_where_the_room_ends() -> None:
    tables = stop_tables([b"x"] * toy.VOCABULARY, end_of_turn=-1)
    # The same number of states, so that no new program is needed.
    tables = dataclasses.replace(tables, transitions=np.zeros_like(stop_tables().transitions))
    found = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, tables=tables)
    for episode in (episode for group in found for episode in group):
        assert set(episode.stops) == {StopReason.BUDGET}
        wanted: list[bool] = []
        for turn in range(TURNS):
            wanted += [True] * min(BUDGET, ROOM - len(wanted))
            told = [False] * len(observation(episode.number, turn))
            if turn + 1 == TURNS or len(wanted) + len(told) >= ROOM:
                break
            wanted += told
        assert episode.authored == wanted
    assert max(len(episode.tokens) for group in found for episode in group) == ROOM


def test_the_end_of_turn_token_ends_a_turn_at_once(sampled: list[list[Episode]]) -> None:
    first_turn = {(b, g): [*sampled[b][g].authored, False].index(False) for b, g in np.ndindex(NUMBERS.shape)}
    b, g = max(first_turn, key=first_turn.__getitem__)
    assert first_turn[b, g] > 1
    chosen = sampled[b][g].tokens[0]
    found = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, tables=stop_tables(end_of_turn=chosen))[b][g]
    assert (found.stops[0], found.authored[:2], found.tokens[0]) == (StopReason.END_OF_TURN, [True, False], chosen)


def test_empty_lanes_never_decode() -> None:
    run = programs(sizes(), CHUNK)
    groups, lanes = assigned(run, toy.prompts(), KEYS)
    empty = np.arange(GROUPS * MEMBERS)[None] // MEMBERS == 1
    lanes = run.assign(groups, lanes, starts(empty))
    lanes = run.decode(WEIGHTS, groups, lanes, stop_tables(), np.float32(1))
    for counts in (lanes.written, lanes.length):
        np.testing.assert_array_equal(np.asarray(counts) == 0, empty)
    assert (np.asarray(lanes.status)[empty] == Lane.EMPTY).all()


def test_fresh_lanes_are_spread_over_the_mesh_and_decoded_by_one_program(caplog: pytest.LogCaptureFixture) -> None:
    """Zeros depend on nothing sharded: left alone, every device would hold every lane, and decoding compile twice."""
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    run = rollout_programs(GRAPH, sizes(1, shards=2, pages=2), DecodeConfig(CHUNK, TEMPERATURE))
    prompts, everyone = toy.prompts((0, 1)), np.ones((2, MEMBERS), np.int32)
    start = starts(everyone, status=everyone, keys=toy.lanes((2, MEMBERS)))
    start = dataclasses.replace(start, member_slot=np.tile(np.arange(MEMBERS), (2, 1)))
    slots, start = jax.device_put((np.zeros((2, 1), np.int32), start), over_groups(mesh))
    with jax.set_mesh(mesh):
        groups, lanes, pages = run.open(PARAMS, prompts.root)
        groups = run.prefill(PARAMS, groups, jax.device_put(prompts, prompt_shardings(mesh)), slots)
        lanes = run.assign(groups, lanes, start)
        weights = run.weights(jax.device_put(PARAMS, replicated(mesh)))
        for step in range(3):
            caplog.clear()
            for leaf in jax.tree.leaves((lanes, pages, groups.hidden, groups.shared.keys, groups.shared.mask)):
                assert leaf.sharding.is_equivalent_to(over_groups(mesh), leaf.ndim), step
            with jax.log_compiles():
                lanes = run.decode(weights, groups, lanes, stop_tables(), np.float32(1))
            compiled = [r for r in caplog.records if r.getMessage().startswith("Finished XLA compilation")]
            assert len(compiled) == (step == 0)
