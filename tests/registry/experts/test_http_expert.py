"""An expert behind a healthy server: what is sent, usage, kept connections, cache, key."""

import asyncio
import contextlib
import json
import logging
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.interface import Message, Request, Sampling
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.registry.experts.http import HttpExpert
from maestro_jax.registry.experts.retries import RetryBudget
from maestro_jax.registry.record.journal import Journal
from maestro_jax.types import Call, Status, Usage
from tests.registry.experts.test_chat import picture
from tests.registry.servers import FORGED, ChatServer, Seen, answer, completion, response, send

Raw = Callable[..., dict[str, Any]]
SECRET = "sk-canary-4711"
REQUEST = Request((Message("user", "how many?"),), deadline=10.0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@contextlib.asynccontextmanager
async def asking(*urls: str, **fields: Any) -> AsyncIterator[HttpExpert]:
    config = ExpertConfig("E", "", endpoints=urls, model="m", **fields)
    made = HttpExpert(config, RetryBudget(lambda: 0.0))
    try:
        yield made
    finally:
        await made.close()


def test_a_reply_has_text_usage_and_seconds() -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42", after=0.05)) as server:
            async with asking(server.url, price_prompt=1.0, price_completion=5.0) as made:
                reply = await made.ask(REQUEST)
        assert (reply.text, reply.status) == ("42", Status.OK)
        assert reply.usage == Usage(10, 2, (10 * 1.0 + 2 * 5.0) / 1e6)
        assert 0.05 <= reply.seconds < 5.0

    run(scenario())


def test_a_reply_without_usage_is_priced_by_estimated_tokens_and_that_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = json.loads(completion("forty-two"))
    del body["usage"]

    async def scenario() -> None:
        async with ChatServer(send(json.dumps(body).encode())) as server:
            async with asking(server.url, price_prompt=1.0, price_completion=5.0) as made:
                replies = [await made.ask(REQUEST), await made.ask(REQUEST)]
        assert [reply.usage for reply in replies] == [Usage(3, 3, (3 * 1.0 + 3 * 5.0) / 1e6)] * 2

    run(scenario())
    assert caplog.text.count("tokens are estimated, 1 for every 4 bytes of text") == 1


def test_the_request_is_that_of_the_config() -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server:
            async with asking(f"{server.url}/", temperature=0.7, max_tokens=9, options={"seed": 1}) as made:
                await made.ask(Request((Message("user", "q", (picture("png"),)),)))
                await made.ask(Request((Message("user", "q"),), Sampling(0.0, 5)))
        own, other = (seen.fields for seen in server.requests)
        assert (server.requests[0].method, server.requests[0].path) == ("POST", "/v1/chat/completions")
        assert [own[key] for key in ("model", "temperature", "max_tokens", "seed")] == ["m", 0.7, 9, 1]
        assert own["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert (other["temperature"], other["max_tokens"]) == (0.0, 5)
        assert "authorization" not in server.requests[0].headers

    run(scenario())


def test_a_large_request_arrives_whole() -> None:
    async def scenario() -> None:
        image = picture("png") + bytes(3 * 2**20)
        async with ChatServer(answer("42")) as server, asking(server.url) as made:
            assert (await made.ask(Request((Message("user", "q", (image,)),)))).status is Status.OK
        assert len(server.requests[0].fields["messages"][0]["content"][0]["image_url"]["url"]) > 4 * 2**20

    run(scenario())


def test_an_image_that_no_server_takes_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server, asking(server.url) as made:
            reply = await made.ask(Request((Message("user", "q", (b"GIF89a",)),)))
        assert reply.status is Status.CONFIG_ERROR and not server.requests

    run(scenario())
    assert "no PNG, JPEG or WebP" in caplog.text


def test_connections_are_kept() -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server, asking(server.url) as made:
            for _ in range(5):
                await made.ask(REQUEST)
            assert server.connections == 1

    run(scenario())


def test_requests_spread_over_endpoints_within_their_concurrency() -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42", after=0.05)) as one, ChatServer(answer("42", after=0.05)) as two:
            async with asking(one.url, two.url, concurrency=3) as made:
                replies = await asyncio.gather(*(made.ask(REQUEST) for _ in range(12)))
        assert {reply.status for reply in replies} == {Status.OK}
        assert (one.most_at_once, two.most_at_once) == (3, 3)
        assert len(one.requests) + len(two.requests) == 12

    run(scenario())


# ---- cache -------------------------------------------------------------------------------------------------


async def ask_twice(raw: Raw, url: str, **fields: Any) -> None:
    expert = {"name": "Served", "description": "", "endpoints": (url,), "model": "m", **fields}
    registry = Registry(parse_registry(raw(experts=(expert,))))
    call = Call("Served", "Plain_Solver", "x")
    await asyncio.gather(*(registry.call(call, "q", (), 5.0) for _ in range(4)))
    await registry.call(call, "q", (), 5.0)
    await registry.close()


@pytest.mark.parametrize(("fields", "requests"), [({}, 1), ({"temperature": 0.1}, 5), ({"deterministic": False}, 5)])
def test_equal_calls_share_a_request_at_temperature_0_only(raw: Raw, fields: dict[str, Any], requests: int) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server:
            await ask_twice(raw, server.url, **fields)
        assert len(server.requests) == requests

    run(scenario())


def test_what_is_asked_at_another_temperature_is_not_kept(raw: Raw) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server:
            expert = {"name": "Served", "description": "", "endpoints": (server.url,), "model": "m"}
            registry = Registry(parse_registry(raw(experts=(expert,))))
            asked = Request(REQUEST.messages, Sampling(temperature=1.0))
            for _ in range(2):
                await registry._experts["served"].ask(asked)
            await registry.close()
        assert len(server.requests) == 2 and len(registry.cache) == 0

    run(scenario())


def test_identity_tells_what_decides_a_reply_apart() -> None:
    def identity(**fields: Any) -> str:
        config = {"endpoints": ("http://127.0.0.1:1/v1",), "model": "m"} | fields
        return HttpExpert(ExpertConfig("E", "", **config), RetryBudget(lambda: 0.0)).identity

    other = [{"model": "n"}, {"max_tokens": 5}, {"top_p": 0.5}, {"options": {"seed": 1}}]
    assert len({identity(), *(identity(**fields) for fields in other)}) == 5
    assert identity() == identity(endpoints=("http://127.0.0.1:2/v1",))  # ports change, the model does not


# ---- key ---------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_never_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    caplog.set_level(logging.DEBUG)

    async def repeat_the_key(seen: Seen, writer: asyncio.StreamWriter) -> None:
        said = f"bad key {seen.headers['authorization']}\n{FORGED}"
        writer.write(response(said.encode(), 401))

    async def scenario() -> None:
        async with ChatServer(repeat_the_key) as server, asking(server.url, key="CANARY") as made:
            assert (await made.ask(REQUEST)).status is Status.CONFIG_ERROR
            (trial,) = await made.try_each(REQUEST)
        assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
        assert "[key]" in trial.outcome.said and SECRET not in trial.outcome.said and "\n" not in trial.outcome.said

    run(scenario())
    assert "bad key Bearer [key]" in caplog.text and SECRET not in caplog.text


async def repeat_the_headers(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(response(completion(f"you sent {seen.headers['authorization']}")))


def test_a_key_that_a_reply_repeats_goes_nowhere(
    raw: Raw, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        async with ChatServer(repeat_the_headers) as server:
            served = {"name": "E", "description": "", "endpoints": (server.url,), "model": "m", "key": "CANARY"}
            journal = Journal(str(tmp_path / "journal.jsonl"))
            registry = Registry(parse_registry(raw(experts=(served,))), str(tmp_path / "cache.jsonl"), journal)
            observation = await registry.call(Call("E", "Plain_Solver", "x"), "q", (), 5.0)
            await registry.close()
            journal.close()
        assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
        assert (observation.status, observation.text) == (Status.OK, "you sent Bearer [key]")

    run(scenario())
    written = [file.read_text() for file in tmp_path.iterdir()]
    assert not any(SECRET in text for text in written)
    assert sum("you sent Bearer [key]" in text for text in written) == 2  # the journal and the cache
    assert SECRET not in caplog.text


def test_a_placeholder_for_a_key_is_a_word_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "EMPTY")

    async def scenario() -> None:
        async with ChatServer(answer("the glass is EMPTY")) as server, asking(server.url, key="CANARY") as made:
            assert (await made.ask(REQUEST)).text == "the glass is EMPTY"

    run(scenario())


@pytest.mark.parametrize("value", [None, "", "  ", "sk\nX-Evil: 1", "schlüssel"])
def test_a_key_that_is_none_names_the_variable(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CANARY", raising=False)
    if value is not None:
        monkeypatch.setenv("CANARY", value)
    with pytest.raises(ConfigError, match=r'^expert "E": environment variable CANARY is not set'):
        HttpExpert(ExpertConfig("E", "", endpoints=("http://x/v1",), model="m", key="CANARY"), RetryBudget(lambda: 0.0))
