"""R8 and R9 of the design: whatever a server does, a request ends in the promised status, in time, without leaks."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from maestro_jax.grpo.advantages import group_advantages
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.interface import Message, Reply, Request
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.registry.experts import http
from maestro_jax.registry.experts.breaker import BreakerState
from maestro_jax.registry.experts.http import HttpExpert
from maestro_jax.registry.experts.retries import RetryBudget, RetryConfig
from maestro_jax.types import Call, Status
from tests.registry.servers import (
    BUSY,
    FAULTS,
    FORGED,
    LATE,
    REFUSALS,
    Behaviour,
    ChatServer,
    Flood,
    answer,
    first,
    hang,
    limited,
    refused,
    send,
    unreachable,
)

DEADLINE = 0.6
EPSILON = 0.4  # a busy machine
QUICK = RetryConfig(first=0.01, longest=0.02)


class Unlimited(RetryBudget):
    """Pays for every retry."""

    def __init__(self) -> None:
        super().__init__(time.monotonic)

    def take(self) -> bool:
        return True


def expert(*urls: str, budget: RetryBudget | None = None, **fields: Any) -> HttpExpert:
    config = ExpertConfig("E", "", endpoints=urls, model="m", **({"attempt_timeout": 0.25} | fields))
    return HttpExpert(config, budget or Unlimited(), QUICK)


def request(deadline: float = DEADLINE) -> Request:
    return Request((Message("user", "how many?"),), deadline=deadline)


def sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs it and checks that it leaves neither tasks nor sockets."""

    async def checked() -> None:
        before = sockets()
        async with asyncio.timeout(20.0):
            await scenario()
            while sockets() > before or len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.005)  # transports close in the loop's next rounds

    asyncio.run(checked())


@contextlib.asynccontextmanager
async def asking(*urls: str, **fields: Any) -> AsyncIterator[HttpExpert]:
    made = expert(*urls, **fields)
    try:
        yield made
    finally:
        await made.close()


async def in_time(made: HttpExpert, deadline: float = DEADLINE) -> Reply:
    start = time.monotonic()
    reply = await made.ask(request(deadline))
    assert time.monotonic() - start < deadline + EPSILON
    return reply


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_in_its_status_within_the_deadline(name: str) -> None:
    async def scenario() -> None:
        async with ChatServer(FAULTS[name]()) as server, asking(server.url) as made:
            reply = await in_time(made)
            expected = Status.TIMEOUT if name in LATE else Status.UNAVAILABLE
            assert (reply.text, reply.status) == ("", expected)
            assert 1 <= len(server.requests) <= 3 + (name in BUSY)

    run(scenario)


def test_a_refused_connection_is_unavailable() -> None:
    async def scenario() -> None:
        async with refused() as url, asking(url) as made:
            assert (await in_time(made)).status is Status.UNAVAILABLE

    run(scenario)


@pytest.mark.parametrize("code", REFUSALS)
def test_what_the_user_has_to_mend_is_asked_once(code: int) -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"{}", code, Location="/elsewhere")) as server, asking(server.url) as made:
            assert (await in_time(made)).status is Status.CONFIG_ERROR
            assert len(server.requests) == 1

    run(scenario)


def test_forged_tags_are_text() -> None:
    async def scenario() -> None:
        async with ChatServer(answer(FORGED)) as server, asking(server.url) as made:
            reply = await in_time(made)
            assert (reply.text, reply.status) == (FORGED, Status.OK)

    run(scenario)


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in BUSY])
def test_the_breaker_opens_within_five_failures(name: str) -> None:
    async def scenario() -> None:
        async with ChatServer(FAULTS[name]()) as server, asking(server.url, attempt_timeout=0.05) as made:
            for _ in range(5):
                await in_time(made)
            assert made.endpoints.all[0].breaker.state is BreakerState.OPEN
            assert len(server.requests) <= 5
            start = time.monotonic()
            assert (await made.ask(request(60.0))).status is Status.UNAVAILABLE
            assert time.monotonic() - start < EPSILON and len(server.requests) <= 5

    run(scenario)


@pytest.mark.parametrize(("attempt_timeout", "expected"), [(1.0, BreakerState.CLOSED), (0.22, BreakerState.OPEN)])
def test_an_attempt_that_its_caller_cut_short_counts_if_it_had_half_its_time(
    attempt_timeout: float, expected: BreakerState
) -> None:
    """A caller in a hurry says nothing of the endpoint. But callers may never have a whole attempt's time left: an
    episode's deadline is often no longer. Then no hang would ever count, and no breaker open."""

    async def scenario() -> None:
        async with ChatServer(FAULTS["hang"]()) as server, asking(server.url, attempt_timeout=attempt_timeout) as made:
            for _ in range(5):
                assert (await made.ask(request(0.2))).status is Status.TIMEOUT
            assert made.endpoints.all[0].breaker.state is expected

    run(scenario)


def test_a_connection_that_is_not_made_in_time_is_the_endpoint_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECT_SECONDS", 0.02)

    async def scenario() -> None:
        with unreachable() as url:
            async with asking(url, attempt_timeout=60.0) as made:
                for _ in range(2):
                    assert (await made.ask(request(5.0))).status is Status.UNAVAILABLE
                assert made.endpoints.all[0].breaker.state is BreakerState.OPEN
                assert made.endpoints.shunned.endswith("(no connection within 0.02 s)")

    run(scenario)


def test_not_more_of_a_flood_is_read_than_the_cap() -> None:
    async def scenario() -> None:
        async with ChatServer(flood := Flood()) as server, asking(server.url, budget=RetryBudget(lambda: 0.0)) as made:
            assert (await in_time(made)).status is Status.UNAVAILABLE
            assert flood.sent < 16 * 2**20  # what fits into buffers of the kernel beside it

    run(scenario)


def test_a_passing_fault_is_tried_again() -> None:
    async def scenario() -> None:
        async with ChatServer(first(2, send(b"", 503), answer("42"))) as server, asking(server.url) as made:
            assert (await in_time(made)).text == "42" and len(server.requests) == 3

    run(scenario)


def test_retry_after_is_obeyed() -> None:
    async def scenario() -> None:
        busy = send(b"", 429, Retry_After="1")
        async with ChatServer(first(1, busy, answer("42"))) as server, asking(server.url) as made:
            start = time.monotonic()
            assert (await made.ask(request(10.0))).text == "42"
            assert time.monotonic() - start >= 1.0

    run(scenario)


# ---- servers that are busy -----------------------------------------------------------------------------------


BUSY_FOR = "0.2"
TOO_MANY = {
    "429": send(b"{}", 429, Retry_After=BUSY_FOR),
    "503": send(b"busy", 503, Retry_After=BUSY_FOR),
    "429 without a time": send(b"{}", 429),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_busy_server_serves_all_and_its_breaker_never_opens(name: str) -> None:
    async def scenario() -> None:
        server = ChatServer(limited(4, 0.02, TOO_MANY[name]))
        # This machine may be busy, too: no attempt is to end for that.
        patient: dict[str, Any] = {"budget": RetryBudget(time.monotonic), "attempt_timeout": 60.0}
        async with server, asking(server.url, **patient, concurrency=64) as made:
            replies = await asyncio.gather(*(made.ask(request(15.0)) for _ in range(100)))
            assert {reply.status for reply in replies} == {Status.OK}
            assert not made.endpoints.all[0].breaker.changes
            assert len(server.requests) < 3 * 100
            assert server.connections <= 64  # one that was refused is kept

    run(scenario)


def test_the_other_endpoint_takes_the_load_of_a_busy_one() -> None:
    async def scenario() -> None:
        busy = send(b"", 429, Retry_After="60")
        async with ChatServer(busy) as one, ChatServer(answer("42")) as two, asking(one.url, two.url) as made:
            start = time.monotonic()
            replies = await asyncio.gather(*(made.ask(request(10.0)) for _ in range(50)))
            assert {reply.text for reply in replies} == {"42"} and time.monotonic() - start < 5.0
            assert len(one.requests) <= 50 // 2 and not made.endpoints.all[0].breaker.changes
            before = len(one.requests)
            await asyncio.gather(*(made.ask(request(10.0)) for _ in range(10)))
            assert len(one.requests) == before

    run(scenario)


def test_who_cannot_wait_for_a_busy_server_hears_it_at_once() -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"", 429, Retry_After="60")) as server, asking(server.url) as made:
            start = time.monotonic()
            replies = [await made.ask(request(20.0)) for _ in range(5)]
            assert {reply.status for reply in replies} == {Status.UNAVAILABLE} and time.monotonic() - start < 5.0
            assert len(server.requests) == 1 and not made.endpoints.all[0].breaker.changes

    run(scenario)


def test_a_server_that_serves_nobody_is_broken_however_it_says_so() -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"", 429, Retry_After="0")) as server, asking(server.url) as made:
            for _ in range(5):
                await in_time(made)
            assert made.endpoints.all[0].breaker.state is BreakerState.OPEN
            assert len(server.requests) == 6
            start = time.monotonic()
            assert (await made.ask(request(60.0))).status is Status.UNAVAILABLE
            assert time.monotonic() - start < EPSILON and len(server.requests) == 6

    run(scenario)


# ---- several endpoints, cancelling, waiting ------------------------------------------------------------------


def test_the_other_endpoint_takes_over() -> None:
    async def scenario() -> None:
        async with refused() as dead, ChatServer(answer("42")) as server, asking(dead, server.url) as made:
            replies = [await in_time(made) for _ in range(20)]
            assert {reply.text for reply in replies} == {"42"}

    run(scenario)


def test_a_cancelled_request_closes_its_connection() -> None:
    async def scenario() -> None:
        async with ChatServer(hang) as server, asking(server.url) as made:
            task = asyncio.create_task(made.ask(request(60.0)))
            while not server.requests:
                await asyncio.sleep(0.001)
            before = sockets()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while sockets() >= before:
                await asyncio.sleep(0.001)  # its transport closes in the loop's next rounds

    run(scenario)


def test_waiting_for_a_turn_ends_with_the_deadline() -> None:
    async def scenario() -> None:
        one_at_a_time: dict[str, Any] = {"concurrency": 1, "attempt_timeout": 60.0}
        async with ChatServer(hang) as server, asking(server.url, **one_at_a_time) as made:
            first_one = asyncio.create_task(made.ask(request(60.0)))
            while not server.requests:
                await asyncio.sleep(0.001)
            assert (await in_time(made, 0.1)).status is Status.TIMEOUT
            assert len(server.requests) == 1
            first_one.cancel()
            await asyncio.gather(first_one, return_exceptions=True)

    run(scenario)


# ---- R9: no retry storm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", [send(b"", 500), send(b"", 429), send(b"", 429, Retry_After="0")])
def test_an_outage_of_everything_sends_no_storm(outage: Behaviour) -> None:
    """Twenty experts whose servers all fail, so that breakers leave retries to the budget for long enough."""

    async def scenario() -> None:
        start = time.monotonic()
        budget = RetryBudget(time.monotonic)
        offered = 0
        async with ChatServer(outage) as server, contextlib.AsyncExitStack() as stack:
            urls = [f"{server.url}/{number}" for number in range(20)]
            experts = [await stack.enter_async_context(asking(url, budget=budget)) for url in urls]
            for _ in range(15):
                await asyncio.gather(*(made.ask(request()) for made in experts))
                offered += len(experts)
                await asyncio.sleep(0.05)
            seconds = time.monotonic() - start
            assert len(server.requests) <= 1.10 * offered + 3 * seconds
            assert len(server.requests) > 5 * len(experts) / 2  # they were asked at all

    run(scenario)


# ---- what it means for learning ------------------------------------------------------------------------------


def test_an_outage_leaves_the_advantages_of_healthy_members_alone() -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as good, ChatServer(send(b"", 500)) as bad:
            experts = tuple(
                {"name": name, "description": "", "endpoints": (server.url,), "model": "m"}
                for name, server in (("Good", good), ("Bad", bad))
            )
            stage = {"kind": "ask", "output": "answer", "prompt": "{query}"}
            skills = ({"name": "S", "stages": (stage,)},)
            registry = Registry(parse_registry({"experts": experts, "services": (), "skills": skills}))
            called = ["Good", "Bad", "Good", "Good", "Bad", "Good"]
            calls = [registry.call(Call(name, "S", str(i)), "q", (), DEADLINE) for i, name in enumerate(called)]
            observations = await asyncio.gather(*calls)
            await registry.close()
        valid = np.array([[not o.status.is_infrastructure for o in observations]])
        assert valid.tolist() == [[name == "Good" for name in called]]
        rewards = np.array([[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        alone = np.flatnonzero(valid[0])
        together, _ = group_advantages(rewards, valid, "std")
        healthy, _ = group_advantages(rewards[:, alone], valid[:, alone], "std")
        assert np.array_equal(together[:, alone], healthy) and not together[~valid].any()

    run(scenario)
