"""Servers outside are reached through the proxy that the environment names, servers inside never are."""

import asyncio
import base64
import urllib.parse
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.fleet.trials import try_experts
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.interface import Message, Request
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.experts.http import HttpExpert
from maestro_jax.registry.experts.proxies import proxy_of
from maestro_jax.registry.experts.retries import RetryBudget
from maestro_jax.types import Status
from tests.registry.servers import Behaviour, ChatServer, Seen, answer, models, send

Raw = Callable[..., dict[str, Any]]
PROXY = "http://proxy.example:3128"
REQUEST = Request((Message("user", "how many?"),), deadline=5.0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def forwarding(*hosts: str, to: ChatServer) -> Behaviour:
    """An HTTP proxy that reaches these hosts, all of which are one server."""

    async def behave(seen: Seen, writer: asyncio.StreamWriter) -> None:
        url = urllib.parse.urlsplit(seen.path)
        assert url.hostname in hosts
        kept = {name: value for name, value in seen.headers.items() if not name.startswith("proxy-")}
        lines = "".join(f"{name}: {value}\r\n" for name, value in kept.items())
        there, back = await asyncio.open_connection("127.0.0.1", urllib.parse.urlsplit(to.url).port)
        back.write(f"{seen.method} {url.path} HTTP/1.1\r\n{lines}\r\n".encode() + seen.body)
        head = await there.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        writer.write(head + await there.readexactly(length))
        back.close()

    return behave


def expert(url: str, **fields: Any) -> HttpExpert:
    return HttpExpert(ExpertConfig("E", "", endpoints=(url,), model="m", **fields), RetryBudget(lambda: 0.0))


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def address(server: ChatServer) -> str:
    return server.url.removesuffix("/v1")


def test_a_server_outside_is_asked_through_the_proxy(environment: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as model, ChatServer(models()) as proxy:
            proxy.behaviour = forwarding("model.example", to=model)
            environment.setenv("HTTP_PROXY", address(proxy).replace("//", "//me:secret@"))
            made = expert("http://model.example:8000/v1")
            assert (await made.ask(REQUEST)).text == "42"
            await made.close()
        assert [seen.path for seen in proxy.requests] == ["http://model.example:8000/v1/chat/completions"]
        told = "Basic " + base64.b64encode(b"me:secret").decode()
        assert proxy.requests[0].headers["proxy-authorization"] == told
        assert "proxy-authorization" not in model.requests[0].headers

    run(scenario)


def test_this_machine_is_never_reached_through_a_proxy(environment: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as model, ChatServer(send(b"", 502)) as proxy:
            environment.setenv("HTTP_PROXY", address(proxy))
            for url in (model.url, model.url.replace("127.0.0.1", "localhost")):
                made = expert(url)
                assert (await made.ask(REQUEST)).text == "42"
                await made.close()
        assert not proxy.requests

    run(scenario)


def test_a_proxy_that_does_not_reach_the_server_is_named(raw: Raw, environment: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with ChatServer(send(b"", 502)) as proxy:
            environment.setenv("HTTPS_PROXY", address(proxy))
            made = expert("https://model.example/v1")
            assert (await made.ask(REQUEST)).status is Status.UNAVAILABLE
            await made.close()
            served = {"name": "E", "description": "", "endpoints": ("https://model.example/v1",), "model": "m"}
            (finding,) = await try_experts(parse_registry(raw(experts=(served,))), 5.0)
        assert {(seen.method, seen.path) for seen in proxy.requests} == {("CONNECT", "model.example:443")}
        assert finding.line.endswith("correct the proxy in HTTP_PROXY or HTTPS_PROXY, or name the host in NO_PROXY")

    run(scenario)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://model.example/v1", PROXY),
        ("https://model.example/v1", "http://secure.example:3129"),  # written without its scheme
        ("https://8.8.8.8/v1", "http://secure.example:3129"),
        ("https://inside.corp.example/v1", None),
        ("https://gpu.inside.corp.example/v1", None),
        ("http://127.0.0.1:8000/v1", None),
        ("http://[::1]:8000/v1", None),
        ("http://localhost:8000/v1", None),
        ("http://node17:8000/v1", None),
        ("http://10.0.0.7:8000/v1", None),
        ("http://192.168.1.2:8000/v1", None),
    ],
)
def test_what_is_inside_is_reached_directly(url: str, expected: str | None, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", PROXY)
    environment.setenv("https_proxy", "secure.example:3129")
    environment.setenv("NO_PROXY", "inside.corp.example")
    assert proxy_of(url, with_key=False) == expected


def test_without_a_variable_everything_is_reached_directly() -> None:
    assert proxy_of("https://model.example/v1", with_key=True) is None


def test_a_variable_that_names_no_http_proxy_is_told_and_not_quoted(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTPS_PROXY", "socks5://me:secret@proxy.example:1080")
    with pytest.raises(ConfigError, match='^expert "E": environment variable HTTPS_PROXY .*NO_PROXY') as caught:
        expert("https://model.example/v1")
    assert "secret" not in str(caught.value)


def test_a_key_that_the_proxy_could_read_is_not_sent(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", PROXY)
    environment.setenv("HTTPS_PROXY", PROXY)
    environment.setenv("CANARY", "sk-canary-4711")
    with pytest.raises(ConfigError, match='^expert "E": .*could read the key; write the endpoint with https'):
        expert("http://model.example/v1", key="CANARY")
    expert("https://model.example/v1", key="CANARY")  # in a tunnel
