"""Cached, chunked decoding of many lanes against a plain loop that runs the whole sequence anew for every token."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch, member_logprobs
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import over_groups
from maestro_jax.policy.model import PrefixBatch, prompt_shardings
from maestro_jax.rollout.automaton import build_automaton
from maestro_jax.rollout.decode import (
    DecodeConfig,
    StopTables,
    append_observations,
    decode_chunk,
    prefill,
)
from maestro_jax.rollout.state import Lane, RolloutState
from maestro_jax.types import StopReason
from tests.rollout import toy

GROUPS, MEMBERS, ROOM, WIDTH = 3, 4, 24, 5  # WIDTH: the longest observation
CONFIG = DecodeConfig(decode_chunk=16, turn_budget=7, room=ROOM, temperature=0.8)
TURNS = 3
TOLERANCE = 2e-5  # fp32; a cache and chunks change the order of sums, nothing else
END_OF_TURN = 290

# Every fifth id opens a tag that every fifth other one completes, so random tokens stop now and then.
PIECES = {0: b"</search", 1: b"> and", 2: b"</answer", 3: b"x"}
TOKEN_BYTES = [b"</answer>" if i % 20 == 4 else PIECES.get(i % 5, b"y") for i in range(toy.VOCABULARY)]
GRAPH, PARAMS = nnx.split(toy.policy(), nnx.Param)


def stop_tables(token_bytes: list[bytes] = TOKEN_BYTES, end_of_turn: int = END_OF_TURN) -> StopTables:
    return StopTables(*build_automaton(token_bytes), np.int32(end_of_turn))


def observation(lane: int, turn: int) -> list[int]:
    """What lane number `lane` is told after turn `turn`: 1 to WIDTH ids."""
    rng = np.random.default_rng((lane, turn))
    return rng.integers(0, 280, 1 + (lane + 2 * turn) % WIDTH).tolist()


@functools.cache
def programs(config: DecodeConfig) -> tuple[Callable, Callable, Callable]:
    def on_policy(function: Callable, **static: Any) -> Callable:
        return jax.jit(lambda params, *args: function(nnx.merge(GRAPH, params), *args, **static))

    chunked = on_policy(decode_chunk, config=config)
    return _prefill(), chunked, _append()


@functools.cache
def _prefill() -> Callable:
    return jax.jit(lambda params, *args: prefill(nnx.merge(GRAPH, params), *args, room=ROOM))


@functools.cache
def _append() -> Callable:
    return jax.jit(lambda params, *args: append_observations(nnx.merge(GRAPH, params), *args))


# ---- the two ways ------------------------------------------------------------------------------------------


def device_episodes(
    prompts: PrefixBatch,
    keys: np.ndarray,
    numbers: np.ndarray,
    noise: float,
    config: DecodeConfig = CONFIG,
    tables: StopTables | None = None,
    patience: Callable[[int, int], int] = lambda lane, turn: 0,
) -> RolloutState:
    """Decodes as the engine does; lane `numbers [B, G]` gets its observation `patience` rounds after its turn."""
    start, decode, append = programs(config)
    tables = tables or stop_tables()
    prefilled, state = start(PARAMS, prompts, keys, np.ones(len(keys), bool))
    waited: dict[tuple[int, int], int] = {}
    while (np.asarray(state.lane) != Lane.DONE).any():
        state = decode(PARAMS, prefilled, state, tables, np.float32(noise))
        lane, turn, length, stop = (np.array(x) for x in (state.lane, state.turn, state.length, state.stop))
        told, told_length = np.zeros((*lane.shape, WIDTH), np.int32), np.zeros(lane.shape, np.int32)
        for at in zip(*np.nonzero((lane == Lane.STOPPED) | (lane == Lane.WAITING)), strict=True):
            key = (int(numbers[at]), int(turn[at]))
            lane[at] = Lane.WAITING
            waited[key] = waited.get(key, -1) + 1
            if waited[key] < patience(*key):
                continue
            ids = observation(*key)
            if stop[at] == StopReason.ANSWER or turn[at] + 1 == TURNS or length[at] + len(ids) >= config.room:
                lane[at] = Lane.DONE
                continue
            told[at][: len(ids)], told_length[at] = ids, len(ids)
            lane[at] = Lane.DECODING
        state = append(PARAMS, prefilled, state, lane, told, told_length)
    return jax.device_get(state)


@dataclasses.dataclass
class Plain:
    """One lane of the plain loop."""

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    authored: list[bool] = dataclasses.field(default_factory=list)
    turn: int = 0
    turn_start: int = 0
    stops: list[StopReason] = dataclasses.field(default_factory=list)
    done: bool = False

    def take(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.authored.append(True)
        text = b"".join(TOKEN_BYTES[i] for i in self.tokens[self.turn_start :])
        ends = {text.find(tag): why for tag, why in TAGS.items() if tag in text}
        stop = ends[min(ends)] if ends else StopReason.NONE
        if not ends and (len(self.tokens) - self.turn_start == CONFIG.turn_budget or len(self.tokens) == ROOM):
            stop = StopReason.BUDGET
        if token == END_OF_TURN:
            stop = StopReason.END_OF_TURN
        if stop:
            self.stops.append(stop)
            self.be_told(observation(self.number, self.turn))

    def be_told(self, ids: list[int]) -> None:
        if self.stops[-1] is StopReason.ANSWER or self.turn + 1 == TURNS or len(self.tokens) + len(ids) >= ROOM:
            self.done = True
            return
        self.tokens += ids
        self.logprobs += [0.0] * len(ids)
        self.authored += [False] * len(ids)
        self.turn, self.turn_start = self.turn + 1, len(self.tokens)


TAGS = {b"</search>": StopReason.CALL, b"</answer>": StopReason.ANSWER}


@jax.jit
def full_logits(params: nnx.State, prompts: PrefixBatch, tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Next-token logits `[B, G, V]` of whole sequences, with nothing kept from one call to the next."""
    policy = nnx.merge(GRAPH, params)
    last, hidden = policy.encode_groups(prompts, tokens, length)
    index = jnp.maximum(length - 1, 0)[..., None, None]
    newest = jnp.take_along_axis(hidden, index, axis=2)[:, :, 0]
    return policy.logits(jnp.where((length > 0)[..., None], newest, last[:, None])) / CONFIG.temperature


def plain_episodes(prompts: PrefixBatch, keys: np.ndarray, noise: float) -> list[list[Plain]]:
    members = range(keys.shape[1])
    lanes = [[Plain(number=b * keys.shape[1] + g) for g in members] for b in range(len(keys))]
    while not all(lane.done for group in lanes for lane in group):
        tokens = np.array([[lane.tokens + [0] * (ROOM - len(lane.tokens)) for lane in group] for group in lanes])
        length = np.array([[len(lane.tokens) for lane in group] for group in lanes], np.int32)
        logits = np.asarray(full_logits(PARAMS, prompts, tokens.astype(np.int32), length))
        for b, g in np.ndindex(keys.shape[:2]):
            lane = lanes[b][g]
            if lane.done:
                continue
            key = jax.random.wrap_key_data(keys[b, g], impl="threefry2x32")
            key = jax.random.fold_in(jax.random.fold_in(key, lane.turn), len(lane.tokens) - lane.turn_start)
            drawn = np.asarray(jax.random.gumbel(key, (toy.VOCABULARY,), jnp.float32))
            row = logits[b, g]
            token = int(np.argmax(row + noise * drawn))
            lane.take(token, float(row[token] - np.logaddexp.reduce(row.astype(np.float64))))
    return lanes


# ---- fixtures ----------------------------------------------------------------------------------------------

NUMBERS = np.arange(GROUPS * MEMBERS).reshape(GROUPS, MEMBERS)
KEYS = toy.lanes((GROUPS, MEMBERS))


@pytest.fixture(scope="module")
def sampled() -> RolloutState:
    return device_episodes(toy.prompts(), KEYS, NUMBERS, noise=1.0)


@pytest.fixture(scope="module")
def plainly_sampled() -> list[list[Plain]]:
    return plain_episodes(toy.prompts(), KEYS, noise=1.0)


def lane_of(state: RolloutState, at: tuple[int, int]) -> dict[str, np.ndarray]:
    names = ("tokens", "logprobs", "authored", "length", "turn", "turn_start", "stop")
    return {name: getattr(state, name)[at] for name in names}


def assert_same_lane(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name], value, atol=tolerance if name == "logprobs" else 0, rtol=0, err_msg=name
        )


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["greedy", "sampled"])
def test_tokens_and_logprobs_are_those_of_a_plain_loop(
    noise: float, sampled: RolloutState, plainly_sampled: list[list[Plain]]
) -> None:
    state = sampled if noise else device_episodes(toy.prompts(), KEYS, NUMBERS, noise)
    for b, group in enumerate(plainly_sampled if noise else plain_episodes(toy.prompts(), KEYS, noise)):
        for g, lane in enumerate(group):
            n = len(lane.tokens)
            assert state.length[b, g] == n
            assert state.tokens[b, g, :n].tolist() == lane.tokens
            assert state.authored[b, g, :n].tolist() == lane.authored
            assert (state.turn[b, g], state.turn_start[b, g], state.stop[b, g]) == (
                lane.turn,
                lane.turn_start,
                lane.stops[-1],
            )
            np.testing.assert_allclose(state.logprobs[b, g, :n], lane.logprobs, atol=TOLERANCE, rtol=0)
            assert not state.authored[b, g, n:].any() and not state.logprobs[b, g, n:].any()


def test_the_comparison_covers_every_way_to_stop(plainly_sampled: list[list[Plain]]) -> None:
    seen = {stop for group in plainly_sampled for lane in group for stop in lane.stops}
    assert {StopReason.CALL, StopReason.ANSWER, StopReason.BUDGET} <= seen
    assert {len(lane.stops) for group in plainly_sampled for lane in group} >= {1, TURNS}


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_and_waiting_change_nothing(chunk: int, sampled: RolloutState) -> None:
    config = dataclasses.replace(CONFIG, decode_chunk=chunk)
    patience = lambda lane, turn: (lane * 3 + turn) % 4  # noqa: E731
    found = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, config, patience=patience)
    for at in np.ndindex(NUMBERS.shape):
        assert_same_lane(lane_of(found, at), lane_of(sampled, at), tolerance=0)


def test_neighbours_change_nothing(sampled: RolloutState) -> None:
    keys, numbers = KEYS.copy(), NUMBERS.copy()
    for at in ((0, 1), (1, 0), (2, 0), (2, 3)):
        keys[at], numbers[at] = keys[at] ^ 1, 100 + numbers[at]
    found = device_episodes(toy.prompts(), keys, numbers, 1.0)
    for at in ((0, 0), (1, 1), (2, 1)):
        assert_same_lane(lane_of(found, at), lane_of(sampled, at), tolerance=0)
    assert (found.tokens[0, 1] != sampled.tokens[0, 1]).any()


SWAPPED = [[(2, m) for m in (3, 0, 1, 2)], [(2, m) for m in (0, 2, 1, 3)], [(0, m) for m in (1, 3, 2, 0)]]


@pytest.mark.parametrize(("groups", "places"), [((1,), [[(1, 1)]]), ((2, 2, 0), SWAPPED)], ids=["alone", "rearranged"])
def test_the_arrangement_in_groups_changes_nothing(
    groups: tuple[int, ...], places: list[list[tuple[int, int]]], sampled: RolloutState
) -> None:
    keys = np.array([[KEYS[at] for at in row] for row in places])
    numbers = np.array([[NUMBERS[at] for at in row] for row in places])
    found = device_episodes(toy.prompts(groups), keys, numbers, 1.0)
    for b, row in enumerate(places):
        for g, at in enumerate(row):
            assert_same_lane(lane_of(found, (b, g)), lane_of(sampled, at), TOLERANCE)


def test_logprobs_are_those_of_the_training_forward(sampled: RolloutState) -> None:
    zeros = np.zeros(sampled.logprobs.shape, np.float32)
    arrays = (sampled.tokens, sampled.length, sampled.authored, zeros, zeros, zeros[..., 0])
    arrays += (loss_rows(sampled.authored),)
    batch = GroupBatch(toy.prompts(), *map(jnp.asarray, arrays))
    logprobs, _ = jax.jit(
        lambda params: member_logprobs(nnx.merge(GRAPH, params), batch, CONFIG.temperature, chunk=toy.VOCABULARY // 3)
    )(PARAMS)
    difference = np.abs(np.asarray(logprobs) - sampled.logprobs)[sampled.authored]
    assert difference.max() <= TOLERANCE


def test_a_turn_ends_at_its_budget_and_the_last_one_where_the_room_ends() -> None:
    tables = stop_tables([b"x"] * toy.VOCABULARY, end_of_turn=-1)
    # The same number of states, so that no new program is needed.
    tables = dataclasses.replace(tables, transitions=np.zeros_like(stop_tables().transitions))
    state = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, tables=tables)
    assert (state.stop == StopReason.BUDGET).all()
    for at in np.ndindex(NUMBERS.shape):
        wanted: list[bool] = []
        for turn in range(TURNS):
            wanted += [True] * min(CONFIG.turn_budget, ROOM - len(wanted))
            told = [False] * len(observation(int(NUMBERS[at]), turn))
            if turn + 1 == TURNS or len(wanted) + len(told) >= ROOM:
                break
            wanted += told
        assert state.authored[at][: state.length[at]].tolist() == wanted
    assert state.length.max() == ROOM


def test_the_end_of_turn_token_ends_a_turn_at_once(sampled: RolloutState) -> None:
    first_turns = sampled.authored.argmin(axis=-1)
    at = np.unravel_index(first_turns.argmax(), NUMBERS.shape)
    assert first_turns[at] > 1
    chosen = int(sampled.tokens[at][0])
    state = device_episodes(toy.prompts(), KEYS, NUMBERS, 1.0, tables=stop_tables(end_of_turn=chosen))
    assert (state.authored[at].argmin(), state.tokens[at][0]) == (1, chosen)


def test_padding_groups_never_decode() -> None:
    start, decode, _ = programs(CONFIG)
    prefilled, state = start(PARAMS, toy.prompts(), KEYS, np.array([True, False, True]))
    state = decode(PARAMS, prefilled, state, stop_tables(), np.float32(1))
    assert (state.length[1] == 0).all() and (state.length[0] > 0).all()
    assert (state.lane[1] == Lane.DONE).all()


def test_fresh_lanes_are_spread_over_the_mesh_and_decoded_by_one_program() -> None:
    """Zeros depend on nothing sharded: left alone, every device would hold every lane, and decoding compile twice."""
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    prompts = jax.device_put(toy.prompts((0, 1)), prompt_shardings(mesh))
    keys, alive = jax.device_put((toy.lanes((2, MEMBERS)), np.ones(2, bool)), over_groups(mesh))
    decode = jax.jit(lambda *args: decode_chunk(nnx.merge(GRAPH, PARAMS), *args, config=CONFIG), donate_argnums=1)
    with jax.set_mesh(mesh):
        prefilled, state = _prefill()(PARAMS, prompts, keys, alive)
        for step in range(3):
            for leaf in jax.tree.leaves(state):
                assert leaf.sharding.is_equivalent_to(over_groups(mesh), leaf.ndim), step
            state = decode(prefilled, state, stop_tables(), np.float32(1))
