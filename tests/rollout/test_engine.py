"""Whole rollouts: episodes end, arrays say what the host recorded, and nothing depends on who answers first."""

import asyncio
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params, replicated
from maestro_jax.policy.model import Policy
from maestro_jax.policy.tokens import Tokens
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Engine, EngineConfig, Rollout, lane_key
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.protocol import TurnKind, parse_turn
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.types import Call, Observation, Status, StopReason
from tests.rollout import toy
from tests.rollout.scripted import Bigram, transitions

GROUPS, MEMBERS = 4, 8
EPISODE = EpisodeConfig(
    max_calls=2, observation_tokens=12, observation_multiple=4, deadline=30.0, turn_budget=24, room=96
)
DECODE = EngineConfig(
    lanes=0,
    decode_chunk=8,
    turn_budget=24,
    room=96,
    append_rows=8,
    prefill_groups=0,
    parked_tokens=0,
    parked_on_host=0,
    temperature=1.0,
)
TASKS = [toy.task(n) for n in range(GROUPS - 1)]  # one group pads the batch
TURNS = [*toy.CALLS * 4, *[toy.ANSWER] * 4, "I am lost.<|im_end|>"]


class Experts:
    """Answers by task and call, after up to `delay` seconds, in no particular order; one pair is out of order."""

    def __init__(self, delay: float, seed: int):
        self.delay = delay
        self.rng = random.Random(seed)

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        await asyncio.sleep(self.rng.uniform(0, self.delay))
        if "2" in question and call.expert == "Lens":
            return Observation("Gone.", Status.UNAVAILABLE)
        return Observation(f"{question[:-1]} {call.expert}", Status.OK)

    async def close(self) -> None:
        pass


def one_device() -> Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@dataclasses.dataclass
class Runner:
    """An engine with its parameters and experts."""

    engine: Engine
    params: nnx.State
    dispatcher: Dispatcher

    def __call__(self, seed: int = 0, step: int = 1, greedy: bool = False, groups: int = GROUPS) -> Rollout:
        return self.engine.rollout(self.params, TASKS, groups, MEMBERS, seed, step, greedy)


def make_runner(graph: nnx.GraphDef, params: nnx.State, mesh: Mesh, tokens: Tokens, experts: Experts) -> Runner:
    dispatcher = Dispatcher(experts)
    exchange = Exchange(tokens, toy.Names(), dispatcher, EPISODE)
    return Runner(Engine(graph, mesh, toy.make_prompts(tokens), exchange, DECODE), params, dispatcher)


def bigram_runner(tokens: Tokens, mesh: Mesh, experts: Experts) -> Runner:
    start = toy.make_prompts(tokens).batch(TASKS[:1])
    table = transitions(TURNS, int(start.tokens[0, start.last[0]]), tokens, toy.VOCABULARY)
    graph, params = nnx.split(Bigram(toy.architecture(), table), nnx.Param)
    return make_runner(graph, jax.device_put(params, replicated(mesh)), mesh, tokens, experts)


@pytest.fixture(scope="module")
def runner(toy_tokens: Tokens) -> Iterator[Runner]:
    made = bigram_runner(toy_tokens, one_device(), Experts(0.0, seed=0))
    yield made
    made.dispatcher.close()


@pytest.fixture(scope="module")
def rollout(runner: Runner) -> Rollout:
    return runner()


def all_lanes(rollout: Rollout) -> list[tuple[tuple[int, int], Trajectory]]:
    return [((g, m), t) for g, group in enumerate(rollout.trajectories) for m, t in enumerate(group)]


def stretches(rollout: Rollout, at: tuple[int, int]) -> list[tuple[bool, list[int]]]:
    """A member's tokens as alternating stretches: (authored by the policy, ids)."""
    found: list[tuple[bool, list[int]]] = []
    n = rollout.length[at]
    for token, authored in zip(rollout.tokens[at][:n], rollout.authored[at][:n], strict=True):
        if not found or found[-1][0] != authored:
            found.append((bool(authored), []))
        found[-1][1].append(int(token))
    return found


def records(rollout: Rollout) -> list[Any]:
    """What the host knows, without times."""
    return [
        (t.task.id, t.member, t.turns, t.answer, t.well_formed, t.marked, [(c, o.text, o.status) for c, o in t.calls])
        for _, t in all_lanes(rollout)
    ]


def assert_same_arrays(found: Rollout, wanted: Rollout) -> None:
    for name in ("tokens", "authored", "length", "logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


# ---- episodes ----------------------------------------------------------------------------------------------


def test_every_episode_ends_and_the_experts_were_asked(rollout: Rollout) -> None:
    trajectories = [t for _, t in all_lanes(rollout)]
    assert all(t.finished and t.pending is None for t in trajectories)
    # The comparison below would be empty without any of these.
    assert any(t.answer == "seven" for t in trajectories) and any(t.answer is None for t in trajectories)
    assert {len(t.calls) for t in trajectories} >= {0, 1, 2}
    assert {t.well_formed for t in trajectories} == {True, False}


def test_tokens_tell_the_recorded_story(rollout: Rollout, runner: Runner) -> None:
    exchange = runner.engine.exchange
    for at, trajectory in all_lanes(rollout):
        parts = stretches(rollout, at)
        turns = [ids for authored, ids in parts if authored]
        told = [ids for authored, ids in parts if not authored]
        assert [authored for authored, _ in parts] == [n % 2 == 0 for n in range(len(parts))]
        assert len(turns) == trajectory.turns
        parsed = [parse_turn(exchange.tokens.decode(ids), StopReason.CALL, toy.Names()) for ids in turns]
        asked = [turn.call for turn in parsed[: EPISODE.max_calls] if turn.call]
        assert asked == [call for call, _ in trajectory.calls]
        answers = [turn.answer for turn in parsed if turn.kind is TurnKind.ANSWER]
        assert answers == ([] if trajectory.answer is None else [trajectory.answer])
        replies = iter(observation for _, observation in trajectory.calls)
        for number, (turn, ids) in enumerate(zip(parsed, told, strict=False), start=1):
            reply = next(replies) if turn.call else Observation(turn.error, turn.status)
            wanted = exchange.observation_ids(reply, last=number >= EPISODE.max_calls)
            closed_itself = turns[number - 1][-1] == exchange.tokens.end_of_turn
            assert ids == wanted[1 if closed_itself else 0 :]


def test_logprobs_stand_where_the_policy_wrote(rollout: Rollout) -> None:
    real = np.arange(EPISODE.room) < rollout.length[..., None]
    assert not (rollout.authored & ~real).any()
    assert not rollout.logprobs[~rollout.authored].any()
    assert (rollout.logprobs <= 0).all() and (rollout.logprobs[rollout.authored] < 0).any()
    assert not rollout.tokens[~real].any()


def test_an_outage_marks_exactly_the_trajectories_that_met_it(rollout: Rollout) -> None:
    met = [any(o.status is Status.UNAVAILABLE for _, o in t.calls) for _, t in all_lanes(rollout)]
    assert [t.marked for _, t in all_lanes(rollout)] == met
    assert any(met)


def test_groups_that_pad_the_batch_have_no_trajectories(rollout: Rollout) -> None:
    assert [[t.task.id for t in group] for group in rollout.trajectories] == [[task.id] * MEMBERS for task in TASKS]
    assert rollout.tokens.shape == (GROUPS, MEMBERS, EPISODE.room)
    assert not rollout.length[len(TASKS) :].any()


# ---- what a rollout depends on -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_in_which_experts_answer_changes_nothing(
    seed: int, rollout: Rollout, runner: Runner, toy_tokens: Tokens
) -> None:
    slow = Dispatcher(Experts(0.02, seed))
    exchange, quick = runner.engine.exchange, runner.dispatcher
    exchange.dispatcher = slow
    try:
        found = runner()
    finally:
        exchange.dispatcher = quick
        slow.close()
    assert_same_arrays(found, rollout)
    assert records(found) == records(rollout)


@pytest.mark.parametrize(("seed", "step"), [(0, 2), (1, 1)])
def test_another_step_or_seed_samples_something_else(seed: int, step: int, rollout: Rollout, runner: Runner) -> None:
    found = runner(seed, step)
    for group in range(len(TASKS)):
        assert (found.tokens[group] != rollout.tokens[group]).any()


def test_members_of_a_group_differ(rollout: Rollout) -> None:
    assert all(len({row.tobytes() for row in group}) > 1 for group in rollout.tokens[: len(TASKS)])


def test_greedy_decoding_knows_no_seed(runner: Runner) -> None:
    one, other = runner(seed=0, greedy=True), runner(seed=5, step=9, greedy=True)
    assert_same_arrays(one, other)
    assert len({row.tobytes() for row in one.tokens[0]}) == 1


def test_lane_keys_depend_on_all_their_parts() -> None:
    parts = [(0, 1, "a", 2), (1, 1, "a", 2), (0, 2, "a", 2), (0, 1, "b", 2), (0, 1, "a", 3)]
    assert len({lane_key(*part).tobytes() for part in parts}) == len(parts)
    assert lane_key(*parts[0]).tobytes() == lane_key(*parts[0]).tobytes()


def test_groups_must_divide_over_the_mesh(toy_tokens: Tokens) -> None:
    runner = bigram_runner(toy_tokens, make_mesh(MeshConfig(2, 2, 2)), Experts(0.0, seed=0))
    with pytest.raises(ConfigError, match="config.grpo.groups=3 does not divide over 4 .* a multiple of 4"):
        runner(groups=3)
    runner.dispatcher.close()


# ---- the real policy, on one device and on a mesh ----------------------------------------------------------


def make_policy() -> Policy:
    toy_size = toy.architecture()
    one_layer = dataclasses.replace(toy_size.text, num_hidden_layers=1)  # programs for eight devices compile slowly
    return Policy(dataclasses.replace(toy_size, text=one_layer), nnx.Rngs(3))


@pytest.fixture(scope="module")
def by_mesh(toy_tokens: Tokens) -> dict[str, Rollout]:
    found = {}
    for name, mesh in (("one device", one_device()), ("mesh", make_mesh(MeshConfig(2, 2, 2)))):
        graph, params = init_params(make_policy, mesh, ShardingRules())
        runner = make_runner(graph, params, mesh, toy_tokens, Experts(0.0, seed=0))
        found[name] = runner()
        runner.dispatcher.close()
    return found


def test_a_random_policy_finishes_all_its_episodes(by_mesh: dict[str, Rollout]) -> None:
    for _, trajectory in all_lanes(by_mesh["one device"]):
        assert trajectory.finished and not trajectory.well_formed and not trajectory.marked


def test_a_mesh_samples_what_one_device_does(by_mesh: dict[str, Rollout]) -> None:
    mesh, alone = by_mesh["mesh"], by_mesh["one device"]
    np.testing.assert_array_equal(mesh.tokens, alone.tokens)
    np.testing.assert_array_equal(mesh.authored, alone.authored)
    # fp32: sums over heads and features are split over the tensor axis.
    np.testing.assert_allclose(mesh.logprobs, alone.logprobs, atol=2e-5, rtol=0)
    assert records(mesh) == records(alone)
