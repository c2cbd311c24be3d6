"""R18: a key goes only to hosts that the config names. Loopback servers write down what reaches them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.interface import Message, Request
from maestro_jax.registry.description.published import heard_by_all, publish
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.experts.http import HttpExpert
from maestro_jax.registry.experts.retries import RetryBudget
from maestro_jax.types import Status
from tests.registry.servers import ChatServer, Seen, answer, send

CANARY = "canary-4711-canary"
SKILL = {"name": "S", "stages": ({"kind": "ask", "output": "a", "prompt": "{question}"},)}
TRUSTED = "https://trusted.example/v1"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHART_KEY", CANARY)


def registry(directory: Path | str, endpoint: str, **fields: Any) -> dict[str, Any]:
    expert = {"name": "Chart", "description": "d", "model": "m", "endpoints": (endpoint,), "key": "CHART_KEY"}
    return {"experts": (expert | fields,), "services": (), "skills": (SKILL,), "endpoints_from": str(directory)}


def say(directory: Path, *urls: str) -> None:
    """As whoever can write to the directory."""
    (directory / "gpu1.json").write_text(json.dumps({"Chart": urls}))


async def ask(raw: dict[str, Any]) -> Status:
    (config,) = parse_registry(raw).experts
    expert = HttpExpert(config, RetryBudget(lambda: 0.0))
    try:
        reply = await expert.ask(Request((Message("user", "how many?"),), None, 5.0))
    finally:
        await expert.close()
    return reply.status


def port_of(server: ChatServer) -> str:
    return server.url.split(":")[2].removesuffix("/v1")


def with_key(server: ChatServer) -> list[Seen]:
    return [seen for seen in server.requests if CANARY in str(seen)]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/v1",
        "http://LOCALHOST:{port}/v1",
        "http://localhost.:{port}/v1",
        "http://127.1:{port}/v1",
        "http://2130706433:{port}/v1",
        "http://0x7f000001:{port}/v1",
        "http://[::ffff:127.0.0.1]:{port}/v1",
        "http://trusted.example@127.0.0.1:{port}/v1",
        "http://trusted.example:443@127.0.0.1:{port}/v1",
        "http://127.0.0.1:{port}#@trusted.example/v1",
        "http://127.0.0.1:{port}/v1?host=trusted.example",
        "http://127.0.0.1:{port}\\.trusted.example/v1",
        "http://127.0.0.1:{port}/trusted.example/v1",
        " http://127.0.0.1:{port}/v1",
    ],
)
def test_a_published_endpoint_elsewhere_never_hears_the_key(tmp_path: Path, url: str) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server:
            say(tmp_path, url.format(port=port_of(server)))
            refused = ""
            try:
                await ask(registry(tmp_path, "http://trusted.example:443/v1"))
            except ConfigError as error:
                refused = str(error)
            assert with_key(server) == [] == server.requests
            assert str(tmp_path / "gpu1.json") in refused

    asyncio.run(scenario())


def test_the_error_names_the_file_the_host_and_the_cure(tmp_path: Path) -> None:
    say(tmp_path, "http://evil.example:8000/v1")
    with pytest.raises(ConfigError) as caught:
        parse_registry(registry(tmp_path, TRUSTED))
    text = str(caught.value)
    assert str(tmp_path / "gpu1.json") in text and '"evil.example"' in text and 'expert "Chart"' in text
    assert 'add "evil.example" to its key_hosts' in text and CANARY not in text


def test_a_redirected_key_stays_where_it_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as other:
            for code in (301, 302, 307, 308):
                target = f"{other.url.replace('127.0.0.1', 'localhost')}/chat/completions"
                async with ChatServer(send(b"", code, Location=target)) as server:
                    say(tmp_path, server.url)
                    assert await ask(registry(tmp_path, "http://127.0.0.1:1/v1")) is Status.CONFIG_ERROR
                    assert len(with_key(server)) == 1
            assert other.requests == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("endpoint", "key_hosts", "published"),
    [
        ("http://127.0.0.1:1/v1", (), "http://127.0.0.1:{port}/v1"),  # a host that the config names, another port
        ("http://localhost:1/v1", (), "http://LOCALHOST:{port}/v1"),
        ("http://gpu.example:1/v1", ("127.0.0.1",), "http://127.0.0.1:{port}/v1"),
        ("http://gpu.example:1/v1", ("*.internal", "127.0.0.*"), "http://127.0.0.1:{port}/v1"),
        ("http://gpu.example:1/v1", ("LOCAL*",), "http://localhost:{port}/v1"),
    ],
)
def test_a_host_that_the_config_names_hears_the_key(
    tmp_path: Path, endpoint: str, key_hosts: tuple[str, ...], published: str
) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server:
            say(tmp_path, published.format(port=port_of(server)))
            assert await ask(registry(tmp_path, endpoint, key_hosts=key_hosts)) is Status.OK
            (seen,) = server.requests
            assert seen.headers["authorization"] == f"Bearer {CANARY}"

    asyncio.run(scenario())


def test_an_expert_without_a_key_is_reached_anywhere_and_sends_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ChatServer(answer("42")) as server:
            say(tmp_path, server.url)
            assert await ask(registry(tmp_path, TRUSTED, key="")) is Status.OK
            (seen,) = server.requests
            assert "authorization" not in seen.headers

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("key_hosts", "host", "fits"),
    [
        (("*.internal",), "gpu1.internal", True),
        (("*.internal",), "gpu1.zone.c.internal", True),
        (("*.internal",), "internal", False),
        (("*.internal",), "gpu1.internal.evil.example", False),
        (("*.internal",), "gpu1.internal.", False),  # the same name only where no search list is
        (("*.internal",), "evil-internal", False),
        (("gpu*",), "gpu17", True),
        (("gpu*",), "gpu.evil.example", False),
        (("gpu-*.cluster",), "gpu-7.cluster", True),
        (("gpu-*.cluster",), "gpu-7.evil.cluster", False),
        (("10.0.0.*",), "10.0.0.7", True),
        (("10.0.0.*",), "10.0.0.evil.example", False),
        (("10.0.0.*",), "10.0.0.com", False),
        (("10.0.0.*",), "10.0.1.7", False),
        (("10.0.0.7",), "10.0.0.70", False),
        (("::1",), "[0:0:0:0:0:0:0:1]", True),
        (("::1",), "[::2]", False),
    ],
)
def test_what_a_pattern_means(tmp_path: Path, key_hosts: tuple[str, ...], host: str, fits: bool) -> None:
    say(tmp_path, f"http://{host}:8000/v1")
    raw = registry(tmp_path, "http://gpu.example:1/v1", key_hosts=key_hosts)
    if fits:
        assert parse_registry(raw).experts[0].endpoints == (f"http://{host}:8000/v1",)
        return
    with pytest.raises(ConfigError, match="key_hosts"):
        parse_registry(raw)


def test_a_key_of_https_does_not_go_out_in_clear(tmp_path: Path) -> None:
    say(tmp_path, "http://trusted.example/v1")
    with pytest.raises(ConfigError, match=r"gpu1\.json.*in clear; publish it with https"):
        parse_registry(registry(tmp_path, TRUSTED))


@pytest.mark.parametrize("pattern", ["*", "*.*", "", "api.*", "1*", "10.0.*", "http://a", "a:80", "a/b", "a b", "*.10"])
def test_a_pattern_that_names_no_hosts_is_refused(tmp_path: Path, pattern: str) -> None:
    raw = registry("", TRUSTED, key_hosts=(pattern,))
    with pytest.raises(ConfigError, match='expert "Chart": key_hosts has .*write hosts'):
        parse_registry(raw)


def test_hosts_without_a_key_are_refused() -> None:
    with pytest.raises(ConfigError, match="key_hosts says where the key may go, and there is no key; remove it"):
        parse_registry(registry("", TRUSTED, key="", key_hosts=("*.internal",)))


def test_what_experts_up_publishes_is_reached_where_the_config_allows_it(tmp_path: Path) -> None:
    """As on a cluster: the config has loopback endpoints with `serve`, another node says where they are."""
    fields = {"serve": ("vllm", "serve", "--port", "{port}")}
    for key, hosts in (("", {}), ("CHART_KEY", {"key_hosts": ("gpu*",)})):
        raw = registry("", "http://127.0.0.1:8000/v1", key=key, **fields, **hosts)
        publish(tmp_path, "gpu17", heard_by_all(parse_registry(raw).experts))
        (found,) = parse_registry(raw | {"endpoints_from": str(tmp_path)}).experts
        assert found.endpoints == ("http://gpu17:8000/v1",)
    raw = registry(tmp_path, "http://127.0.0.1:8000/v1", **fields)
    with pytest.raises(ConfigError, match='add "gpu17" to its key_hosts'):
        parse_registry(raw)
