"""Endpoints that are left alone are probed without anybody's doing, cheaply, and used again once they are back."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.experts import endpoints, http
from maestro_jax.registry.experts.breaker import BreakerConfig
from maestro_jax.registry.record.journal import Journal, RequestLine, read_lines
from maestro_jax.registry.record.replay import Replay, Resumed
from maestro_jax.types import Call, Status
from tests.registry.experts.test_http_faults import asking, request, run
from tests.registry.servers import FAULTS, ChatServer, Seen, answer, hang, models, refused, send

Raw = Callable[..., dict[str, Any]]
SCALE = 0.01  # of the breaker's seconds
CALL = Call("Served", "Plain_Solver", "x")
SECRET = "sk-canary-4711"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = BreakerConfig()
    quick = functools.partial(BreakerConfig, first=SCALE * usual.first, longest=SCALE * usual.longest)
    monkeypatch.setattr(endpoints, "BreakerConfig", quick)
    # Retries wait for chance, and have nothing to do with this.
    monkeypatch.setattr(http.RetryBudget, "take", lambda budget: False)


@contextlib.asynccontextmanager
async def serving(raw: Raw, *urls: str, journal: Journal | None = None, **fields: Any) -> AsyncIterator[Registry]:
    served = {"name": "Served", "description": "", "endpoints": urls, "model": "m", "deterministic": False} | fields
    service = {"name": "reads", "expert": "Served", "prompt": "Read it."}
    registry = Registry(parse_registry(raw(experts=(served,), services=(*raw()["services"], service))), journal=journal)
    try:
        yield registry
    finally:
        await registry.close()


async def fail(registry: Registry, times: int = 5) -> None:
    for _ in range(times):
        assert (await registry.call(CALL, "q", (), 5.0)).status is not Status.OK


async def until(found: Callable[[], object]) -> None:
    async with asyncio.timeout(5.0):
        while not found():
            await asyncio.sleep(0.002)


def states(registry: Registry, url: str) -> list[str]:
    return [state for _, state in registry.report()["Served"]["breakers"][url]]


async def engine_is_dead(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """The server still lists its models, and fails all that needs one."""
    await (models("m") if seen.method == "GET" else send(b"engine dead", 500))(seen, writer)


async def likes_requests_only(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """It cannot do without what requests have and probes have not."""
    await (answer("42") if b"many?" in seen.body else send(b"no picture", 500))(seen, writer)


OUTAGES = {
    "500": send(b"", 500),
    "engine dead": engine_is_dead,
    "hangs": hang,
    "no HTTP": FAULTS["no HTTP"](),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_a_server_that_is_back_is_asked_again_though_nobody_asks(raw: Raw, outage: str) -> None:
    async def scenario() -> None:
        async with ChatServer(OUTAGES[outage]) as server, serving(raw, server.url, attempt_timeout=0.1) as registry:
            await fail(registry, 7)
            before = len(server.requests)
            await until(lambda: len(server.requests) >= before + 2)
            assert registry.shunned() and states(registry, server.url)[-1] != "closed"
            server.behaviour = answer("42")
            await until(lambda: states(registry, server.url)[-1] == "closed")
            assert not registry.shunned()
            assert (await registry.call(CALL, "q", (), 5.0)).text == "42"

    run(scenario)


def test_a_server_that_was_too_busy_for_anybody_is_asked_again() -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"", 429, Retry_After="0")) as server, asking(server.url) as made:
            while not made.endpoints.shunned:
                await made.ask(request())
            server.behaviour = answer("42")
            await until(lambda: not made.endpoints.shunned)

    run(scenario)


def test_a_server_that_was_not_there_is_asked_again_once_it_is(raw: Raw) -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with refused() as url:
                registry = await stack.enter_async_context(serving(raw, url))
                await fail(registry)
                assert registry.shunned()
            await stack.enter_async_context(ChatServer(answer("42"), port=int(url.split(":")[2].removesuffix("/v1"))))
            await until(lambda: not registry.shunned())

    run(scenario)


def test_shunned_names_experts_and_the_services_behind_them(raw: Raw) -> None:
    async def scenario() -> None:
        async with refused() as dead, ChatServer(answer("42")) as alive:
            async with serving(raw, dead) as registry:
                assert registry.shunned() == {}
                await fail(registry)
                reason = f"every endpoint is left alone: {dead} (no connection (ClientConnectorError))"
                assert registry.shunned() == {"Served": reason, "reads": reason}
            async with serving(raw, dead, alive.url) as registry:
                for _ in range(20):
                    await registry.call(CALL, "q", (), 5.0)
                assert states(registry, dead)[0] == "open" and registry.shunned() == {}

    run(scenario)


def test_a_probe_is_one_token_in_words_and_no_call(raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    file = str(tmp_path / "journal.jsonl")

    async def scenario() -> None:
        journal = Journal(file)
        async with ChatServer(send(b"", 500)) as server:
            fields: dict[str, Any] = {"key": "CANARY", "options": {"seed": 1}, "rename": {"top_p": ""}}
            async with serving(raw, server.url, journal=journal, **fields) as registry:
                await fail(registry)
                server.behaviour = answer("42")
                await until(lambda: not registry.shunned())
                (probes,) = registry.report()["Served"]["probes"].values()
                assert registry.report()["Served"]["calls"] == registry.spending.calls == 5
        journal.close()
        *_, probe = server.requests
        assert probes == len(server.requests) - 5
        assert (probe.fields["max_tokens"], probe.fields["seed"], probe.headers["authorization"]) == (
            1,
            1,
            f"Bearer {SECRET}",
        )
        assert "top_p" not in probe.fields
        assert isinstance(probe.fields["messages"][0]["content"], str) and len(probe.body) < 300

    run(scenario)
    assert sum(isinstance(line, RequestLine) for line in read_lines(file)) == 5


def test_where_probes_are_answered_with_faults_a_request_decides(raw: Raw) -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"", 500)) as server, serving(raw, server.url) as registry:
            await fail(registry)
            server.behaviour = likes_requests_only
            await until(lambda: states(registry, server.url)[-1] == "half-open")
            before = len(server.requests)
            replies = await asyncio.gather(*(registry.call(CALL, "how many?", (), 5.0) for _ in range(5)))
            assert [reply.status for reply in replies].count(Status.OK) == 1 == len(server.requests) - before
            assert states(registry, server.url)[-1] == "closed"

    run(scenario)


def test_who_waits_for_a_turn_gets_it_when_an_endpoint_is_back(raw: Raw) -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"", 500)) as one, ChatServer(hang) as two:
            fields: dict[str, Any] = {"concurrency": 1, "attempt_timeout": 60.0}
            async with serving(raw, one.url, two.url, **fields) as registry:
                await fail(registry)  # on the first one
                busy = asyncio.create_task(registry.call(CALL, "q", (), 60.0))
                await until(lambda: two.requests)
                one.behaviour = answer("42")
                assert (await registry.call(CALL, "q", (), 5.0)).text == "42"
                busy.cancel()

    run(scenario)


@pytest.mark.parametrize("outage", ["500", "hangs"])
def test_closing_ends_probes_and_their_connections(raw: Raw, outage: str) -> None:
    async def scenario() -> None:
        async with ChatServer(OUTAGES[outage]) as server:
            async with serving(raw, server.url, attempt_timeout=0.1) as registry:
                await fail(registry)
                await until(lambda: registry.report()["Served"]["probes"][server.url])

    run(scenario)  # which leaves neither tasks nor sockets


def test_a_dispatcher_says_who_is_shunned_and_a_replay_shuns_nobody(raw: Raw, tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "journal.jsonl"))
    served = {"name": "Served", "description": "", "endpoints": ("http://127.0.0.1:9/v1",), "model": "m"}
    registry = Registry(parse_registry(raw(experts=(served,))), journal=journal)
    dispatcher = Dispatcher(Resumed(registry, journal), journal)
    try:
        for ticket in range(5):
            dispatcher.submit(ticket, Call("Served", "Plain_Solver", str(ticket)), "q", (), 5.0)
        deadline = time.monotonic() + 5.0
        while not dispatcher.shunned() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert list(dispatcher.shunned()) == ["Served"]
    finally:
        dispatcher.close()
        journal.close()
    other = Journal(str(tmp_path / "other.jsonl"))
    assert Resumed(Replay(journal.path, other), other).shunned() == {}
    other.close()
