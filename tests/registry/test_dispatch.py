"""The registry's calls and the dispatcher's thread: every ticket comes back once, with a status."""

import asyncio
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.types import Call, Observation, Status

Raw = Callable[..., dict[str, Any]]
CALL = Call("Echo-One", "Plain_Solver", "the dots")


def hanging(name: str = "Slow") -> dict[str, Any]:
    return {"name": name, "description": "never answers", "implementation": "fake_specialists:Hang"}


def call(registry: Registry, *calls: Call, deadline: float = 30.0) -> list[Observation]:
    async def scenario() -> list[Observation]:
        found = [await registry.call(c, "how many?", (b"img",), deadline) for c in calls]
        await registry.close()
        return found

    return asyncio.run(scenario())


def test_a_call_runs_the_skill_with_the_expert(raw: Raw) -> None:
    registry = Registry(parse_registry(raw()))
    plain, text = call(registry, CALL, Call("echo two", "TEXT-SOLVER", "x"))
    assert (plain.text, plain.status) == ("echo Focus: the dots 1", Status.OK)
    assert (text.text, text.status) == ("two words of 1; how many? 2", Status.OK)


def test_an_unknown_name_is_an_observation(raw: Raw) -> None:
    registry = Registry(parse_registry(raw()))
    (observation,) = call(registry, Call("Nobody", "Plain_Solver", "x"))
    assert (observation.status, observation.text[:23]) == (Status.UNKNOWN, 'Unknown expert "Nobody"')


def test_equal_calls_ask_once_and_cost_the_same(raw: Raw, specialists: ModuleType) -> None:
    first, second = call(Registry(parse_registry(raw())), CALL, CALL)
    assert first == second and specialists.Echo.asked == 1


def test_a_nondeterministic_expert_is_asked_every_time(raw: Raw, specialists: ModuleType) -> None:
    experts = tuple({**e, "deterministic": False} for e in raw()["experts"])
    call(Registry(parse_registry(raw(experts=experts))), CALL, CALL)
    assert specialists.Echo.asked == 2


def test_services_are_shared_by_experts_and_queries(raw: Raw, specialists: ModuleType) -> None:
    registry = Registry(parse_registry(raw()))
    call(registry, Call("Echo-One", "Text_Solver", "a"), Call("Echo-Two", "Text_Solver", "b"))
    assert specialists.Words.ran == 1


def test_a_cache_file_serves_the_next_registry(raw: Raw, specialists: ModuleType, tmp_path: pathlib.Path) -> None:
    config, path = parse_registry(raw()), str(tmp_path / "replies.jsonl")
    first = call(Registry(config, path), CALL)
    assert call(Registry(config, path), CALL) == first and specialists.Echo.asked == 1


def test_a_hanging_expert_times_out_and_leaves_the_others_alone(raw: Raw) -> None:
    registry = Registry(parse_registry(raw(experts=(*raw()["experts"], hanging()))))
    slow, quick = call(registry, Call("Slow", "Plain_Solver", "x"), CALL, deadline=0.05)
    assert (slow.status, quick.status) == (Status.TIMEOUT, Status.OK)


# ---- dispatcher --------------------------------------------------------------------------------------------


class StubRegistry:
    """Answers with the query, or does what the query names; knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = False
        self.entered = threading.Event()
        self.gate = asyncio.Event()

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        self.entered.set()
        if call.query == "raise":
            raise KeyError("boom")
        if call.query == "wait":
            await self.gate.wait()
        return Observation(call.query, Status.OK)

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def stub() -> StubRegistry:
    return StubRegistry()


@pytest.fixture
def dispatcher(stub: StubRegistry) -> Iterator[Dispatcher]:
    found = Dispatcher(stub)
    yield found
    found.close()


def submit(dispatcher: Dispatcher, ticket: int, query: str, deadline: float = 30.0) -> None:
    dispatcher.submit(ticket, Call("E", "S", query), "q", (), deadline)


def collect(dispatcher: Dispatcher, count: int) -> dict[int, Observation]:
    found: list[tuple[int, Observation]] = []
    while len(found) < count:
        assert dispatcher.wait(10.0), "nothing arrived"
        found += dispatcher.collect()
    assert len(dict(found)) == len(found)
    return dict(found)


def test_every_ticket_comes_back_once(dispatcher: Dispatcher) -> None:
    for ticket in range(50):
        submit(dispatcher, ticket, f"q{ticket}")
    found = collect(dispatcher, 50)
    assert {ticket: o.text for ticket, o in found.items()} == {t: f"q{t}" for t in range(50)}
    assert dispatcher.collect() == []


def test_waiting_for_nothing_ends(dispatcher: Dispatcher) -> None:
    assert dispatcher.wait(0.01) is False


def test_an_exception_becomes_unavailable_with_a_traceback_in_the_log(
    dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    submit(dispatcher, 1, "raise")
    found = collect(dispatcher, 1)[1]
    assert (found.status, "boom" in found.text) == (Status.UNAVAILABLE, False)
    assert "KeyError: 'boom'" in caplog.text


def test_the_deadline_holds_even_if_the_registry_forgets_it(dispatcher: Dispatcher) -> None:
    submit(dispatcher, 1, "wait", deadline=0.01)
    submit(dispatcher, 2, "wait", deadline=-5.0)
    assert {o.status for o in collect(dispatcher, 2).values()} == {Status.TIMEOUT}


def test_a_slow_call_does_not_hold_up_the_others(dispatcher: Dispatcher) -> None:
    submit(dispatcher, 1, "wait")
    submit(dispatcher, 2, "quick")
    assert list(collect(dispatcher, 1)) == [2]


def test_close_returns_what_runs_as_unavailable(dispatcher: Dispatcher, stub: StubRegistry) -> None:
    submit(dispatcher, 1, "wait")
    assert stub.entered.wait(10.0)
    submit(dispatcher, 2, "wait")
    dispatcher.close()
    submit(dispatcher, 3, "late")
    assert {o.status for o in collect(dispatcher, 3).values()} == {Status.UNAVAILABLE}
    assert stub.closed


def test_closing_twice_is_fine_and_ends_the_thread(stub: StubRegistry) -> None:
    before = threading.active_count()
    dispatcher = Dispatcher(stub)
    dispatcher.close()
    dispatcher.close()
    assert threading.active_count() == before


def test_close_survives_a_registry_that_does_not(
    stub: StubRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise OSError("disk")

    monkeypatch.setattr(stub, "close", fail)
    with caplog.at_level(logging.ERROR):
        Dispatcher(stub).close()
    assert "did not close cleanly" in caplog.text


def test_a_real_registry_behind_the_dispatcher(raw: Raw, specialists: ModuleType) -> None:
    dispatcher = Dispatcher(Registry(parse_registry(raw())))
    for member in range(8):
        dispatcher.submit(member, CALL, "how many?", (b"img",), 30.0)
    found = collect(dispatcher, 8)
    dispatcher.close()
    assert {o.text for o in found.values()} == {"echo Focus: the dots 1"} and specialists.Echo.asked == 1
