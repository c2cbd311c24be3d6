"""The scheduling benchmarks at toy size: traces, the expert server, scripted rollouts, what is reported and refused."""

import asyncio
import dataclasses
import http.client
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from benchmarks import rollout_schedule, rollout_steady, scripted
from benchmarks.expert_server import OBSERVATION, AsyncExpertClient, ExpertClient, Script, ServerProcess, as_text
from benchmarks.pairs import MismatchError
from benchmarks.rollout_schedule import TOY, engine_config
from benchmarks.scripted import ScriptedRollouts
from benchmarks.traces import (
    Episode,
    Latency,
    Trace,
    call_name,
    draw_trace,
    latency_table,
    task_name,
    write_turn,
)
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.tokens import Tokens

AT_ONCE = dataclasses.replace(TOY, latency=Latency(1e-4, 2e-4))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return scripted.make_tokens(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        yield server


@pytest.fixture(scope="module")
def rollouts(tokens: Tokens, server: ServerProcess) -> Iterator[ScriptedRollouts]:
    made = ScriptedRollouts(tokens, server.port, engine_config(TOY), TOY.members, step_seconds=0.0)
    yield made
    made.close()


# ---- traces ------------------------------------------------------------------------------------------------


def test_latencies_have_the_mean_and_the_tail_that_are_asked_for() -> None:
    drawn = Latency(mean=0.15, p99=0.75).draw(np.random.default_rng(0), 400_000)
    assert drawn.mean() == pytest.approx(0.15, rel=0.01)
    assert np.quantile(drawn, 0.99) == pytest.approx(0.75, rel=0.02)


def test_a_trace_follows_from_its_seed_and_survives_json() -> None:
    trace = draw_trace(TOY, 3)
    assert trace == draw_trace(TOY, 3) != draw_trace(TOY, 4)
    assert Trace.from_json(dataclasses.asdict(trace)).bound(0.01, 4) == trace.bound(0.01, 4)


def test_every_call_has_a_number_of_its_own_and_ends_a_turn() -> None:
    trace = draw_trace(rollout_schedule.FULL, 0)
    numbers = [number for episode in trace.episodes for number in episode.calls]
    assert numbers == list(range(len(numbers)))
    assert all(len(e.turns) == len(e.calls) + 1 == len(e.latencies) + 1 for e in trace.episodes)


@pytest.mark.parametrize(
    ("lanes", "wanted"),
    [(1, (10 + 20 + 5 + 1) * 0.1), (100, 30 * 0.1 + 2.0)],  # all tokens in one lane; the first episode alone
)
def test_the_bound_is_the_longer_of_all_tokens_and_the_slowest_episode(lanes: int, wanted: float) -> None:
    episodes = Episode((10, 20), (0,), (2.0,)), Episode((5, 1), (1,), (1.0,))
    slow = Trace(0, (episodes,))
    if lanes == 1:
        slow = Trace(0, (tuple(dataclasses.replace(e, latencies=(0.0,)) for e in episodes),))
    assert slow.bound(0.1, lanes) == pytest.approx(wanted)


def test_a_turn_has_its_length_and_ends_as_it_should(tokens: Tokens) -> None:
    ending = f"<search> Glyph@@Reading: {call_name(7)}</search>"
    ids = write_turn(tokens.encode, ending, 40)
    assert len(ids) == 40
    assert tokens.decode(ids).endswith(ending)
    assert tokens.encode(tokens.decode(ids)) == ids  # the async worker tokenises conversations anew
    with pytest.raises(ValueError, match="a turn of 3 tokens cannot end"):
        write_turn(tokens.encode, ending, 3)


# ---- the server ----------------------------------------------------------------------------------------------


def test_a_script_goes_on_behind_the_last_name_of_a_prompt() -> None:
    script = Script([7], 2, {as_text([1, 1]): [[50], [51]], as_text([1, 2]): [[60, 61]]})
    assert script.next_turn([9, 7, 1, 1, 9]) == [50]
    assert script.next_turn([9, 7, 1, 1, 9, 50, 7, 1, 2, 8]) == [60, 61]
    assert script.next_turn([9, 7, 1, 1, 9]) == [51]  # the next member
    assert script.next_turn([9, 7, 1, 1, 9]) is None
    assert script.next_turn([9, 7, 3, 3, 9]) is None


def test_experts_answer_in_the_order_of_their_latencies(server: ServerProcess) -> None:
    names = [call_name(n) for n in range(3)]
    server.replay(dict(zip(names, (0.2, 0.1, 0.0), strict=True)))
    answered: list[str] = []

    async def ask(client: AsyncExpertClient, name: str) -> None:
        assert await client.ask(name) == OBSERVATION
        answered.append(name)

    async def ask_all() -> None:
        client = AsyncExpertClient(server.port)
        await client.connect(3)
        await asyncio.gather(*(ask(client, name) for name in names))
        client.close()

    asyncio.run(ask_all())
    assert answered == names[::-1]
    assert sorted(server.served()) == names


def test_completions_follow_the_script_in_vllms_form(server: ServerProcess) -> None:
    client = ExpertClient(server.port)
    turns = {as_text([1]): [[4, 5]]}
    client.post("/script", {"step_seconds": 0.0, "opening": [7], "width": 1, "turns": turns})
    reply = client.post("/v1/completions", {"prompt": [7, 1]})
    assert reply == {"choices": [{"token_ids": [4, 5], "logprobs": {"token_logprobs": [0.0, 0.0]}}]}
    client.close()


def test_a_prompt_without_a_script_is_held_and_others_are_answered(server: ServerProcess) -> None:
    client = ExpertClient(server.port)
    client.post("/script", {"step_seconds": 0.0, "opening": [7], "width": 1, "turns": {}})
    held = http.client.HTTPConnection("127.0.0.1", server.port)
    held.request("POST", "/v1/completions", '{"prompt": [7, 1]}')
    assert client.post("/served", {}).keys() == {"calls"}
    held.close()
    assert client.post("/served", {}).keys() == {"calls"}
    client.close()


# ---- our side ------------------------------------------------------------------------------------------------


def test_scripted_rollouts_ask_and_write_what_stands_in_the_trace(
    rollouts: ScriptedRollouts, server: ServerProcess
) -> None:
    for seed in range(2):  # the second one runs compiled, with other scripts
        trace = draw_trace(AT_ONCE, seed)
        server.replay(latency_table(trace))
        rollouts.engine.chunks.clear()
        assert rollouts.run(trace) > 0
        assert sorted(server.served()) == sorted(latency_table(trace))
        assert sum(chunk.tokens for chunk in rollouts.engine.chunks) == trace.tokens


def test_other_episodes_are_refused(
    rollouts: ScriptedRollouts, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = draw_trace(AT_ONCE, 0)
    first, *others = trace.groups
    longer = dataclasses.replace(first[1], turns=(first[1].turns[0] + 1, *first[1].turns[1:]))
    written = rollouts.scripts(Trace(0, ((first[0], longer), *others)))
    monkeypatch.setattr(rollouts, "scripts", lambda _: written)
    server.replay(latency_table(trace))
    with pytest.raises(MismatchError, match=f"member 1 of {task_name(0)} asked, wrote and answered"):
        rollouts.run(trace)


def test_a_chunk_takes_its_time(tokens: Tokens, server: ServerProcess) -> None:
    step = 2e-3
    paced = ScriptedRollouts(tokens, server.port, engine_config(TOY), TOY.members, step)
    trace = draw_trace(AT_ONCE, 0)
    server.replay(latency_table(trace))
    seconds = paced.run(trace)
    paced.close()
    assert all(c.end >= c.start + int(c.written.max()) * step for c in paced.engine.chunks)
    assert seconds >= trace.bound(step, len(trace.episodes))


# ---- comparison ----------------------------------------------------------------------------------------------


class Peer:
    """A worker that says what TRL's would, without doing it."""

    def __init__(self, spoil: Callable[[dict[str, Any]], None] = lambda outcome: None):
        self.spoil = spoil
        self.order: list[str] = []
        self.ports: list[int] = []

    def __call__(self, *_: object) -> "Peer":
        return self

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "prepare":
            self.ports.append(arguments["port"])
            return {"versions": {}}
        trace = Trace.from_json(arguments["trace"])
        client = ExpertClient(self.ports[-1])
        for number in trace.latencies:
            client.ask(call_name(number))
        client.close()
        self.order.append(arguments["side"])
        seconds = {"functions": 3.0, "coroutines": 2.0, "worker": float(next(self._worker_seconds))}
        outcome = {
            "seconds": seconds[arguments["side"]],
            "tokens": trace.tokens,
            "observations": len(trace.latencies),
        }
        self.spoil(outcome)
        return outcome

    _worker_seconds = itertools.cycle((1.0, 9.0, 1.5))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Peer]:
    made = Peer()
    monkeypatch.setattr(rollout_schedule, "Worker", made)
    monkeypatch.setattr(rollout_schedule.environment, "python", lambda *_: Path("python"))
    monkeypatch.setattr(rollout_schedule, "TOY", AT_ONCE)
    with flagsaver.as_parsed(peers=str(tmp_path)):
        yield made


def test_every_side_runs_every_trace_and_medians_count(peer: Peer) -> None:
    with ExitStack() as stack:
        sides = rollout_schedule.Sides(AT_ONCE, stack, Progress())
        peer.order.clear()
        seconds = [sides.run_all(draw_trace(AT_ONCE, seed)) for seed in (0, 1)]
    fast = ["worker"] * rollout_schedule.REPEATS
    assert peer.order == ["functions", "coroutines", *fast, *fast, "coroutines", "functions"]
    for found in seconds:
        assert (found["functions"], found["coroutines"], found["worker"]) == (3.0, 2.0, 1.5)
        assert found["ours"] > 0


def test_the_bound_stands_beside_every_measure(peer: Peer) -> None:
    results = rollout_schedule.run_s1(Progress(), pairs=2, smoke=True)
    assert results.keys() == {"S1", "S1_coroutines", "S1_worker"}
    for result in results.values():
        assert len(result.pairs) == 2
        bounds, over = result.details["bound_seconds"], result.details["over_bound"]["ours"]
        assert [ours / bound for (ours, _), bound in zip(result.pairs, bounds, strict=True)] == over
    assert results["S1"].ratio > results["S1_coroutines"].ratio > results["S1_worker"].ratio


@pytest.mark.parametrize("figure", ["tokens", "observations"])
def test_a_peer_that_does_something_else_is_refused(peer: Peer, figure: str) -> None:
    peer.spoil = lambda outcome: outcome.update({figure: outcome[figure] - 1})
    with pytest.raises(MismatchError, match="tokens and .* observations of trace"):
        rollout_schedule.run_s1(Progress(), pairs=1, smoke=True)


# ---- the steady state ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(rollout_steady.SMALL, warm_in=20, seconds=0.2)
    monkeypatch.setattr(rollout_steady, "SMALL", shape)


@pytest.mark.usefixtures("quick")
def test_released_and_held_lanes_are_measured_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "lanes.png"
    result = rollout_steady.run_steady(Progress(), pairs=1, smoke=True, picture=picture)["steady"]
    shares = result.details["utilisation"]
    assert 0 < shares["released"] <= 1 and 0 < shares["held"] <= 1
    assert result.details["in_flight"]["held"][0] <= rollout_steady.SMALL.lanes + 1e-9
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1 << 20)}
    assert (0x00, 0x72, 0xB2) in colours  # something decodes


def test_a_supply_that_ends_is_refused(rollouts: ScriptedRollouts, server: ServerProcess) -> None:
    shape = dataclasses.replace(rollout_steady.SMALL, load=AT_ONCE, slots=AT_ONCE.groups, warm_in=1, seconds=1.0)
    with pytest.raises(ValueError, match="draw more groups"):
        rollout_steady.measure(rollouts, server, draw_trace(AT_ONCE, 0), shape)
