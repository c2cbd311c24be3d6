"""What `doctor` asks every endpoint, and what it says of each way to fail."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from configs.registry import maestro
from maestro_jax.fleet.trials import Finding, is_shown_pictures, try_experts
from maestro_jax.registry.description.config import LimitsConfig, RegistryConfig
from maestro_jax.registry.description.reading import parse_registry
from tests.registry.servers import (
    Behaviour,
    ChatServer,
    Seen,
    answer,
    completion,
    drip,
    hang,
    refused,
    response,
    send,
)

LOOK = {"name": "Look", "stages": ({"kind": "ask", "output": "answer", "prompt": "{question}"},)}
READ = {"name": "Read", "stages": ({"kind": "ask", "output": "answer", "prompt": "{question}", "images": "none"},)}
SECRET = "sk-canary-4711"


def registry(*urls: str, skill: dict[str, Any] = LOOK, **fields: Any) -> RegistryConfig:
    expert = {"name": "Far", "description": "d", "endpoints": urls, "model": "m", **fields}
    return parse_registry({"experts": (expert,), "services": (), "skills": (skill,)})


def tried(behaviour: Behaviour, seconds: float = 10.0, **fields: Any) -> tuple[list[Finding], list[Seen]]:
    """What is said of one server, and what it was asked."""

    async def scenario() -> tuple[list[Finding], list[Seen]]:
        async with ChatServer(behaviour) as server:
            found = await try_experts(registry(server.url, **fields), seconds)
            return [Finding(one.line.replace(server.url, "URL"), one.is_problem) for one in found], server.requests

    return asyncio.run(scenario())


def shows(seen: Seen) -> bool:
    return isinstance(seen.fields["messages"][0]["content"], list)


async def blind(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """A model of words, as vLLM serves one."""
    refusal = response(b"m is not a multimodal model", 400)
    writer.write(refusal if not seen.body or shows(seen) else response(completion("ready")))


async def other_model(seen: Seen, writer: asyncio.StreamWriter) -> None:
    if seen.method == "GET":
        writer.write(response(b'{"data": [{"id": "Chart-R1"}, {"id": "\\u001b[31mred"}]}'))
    else:
        writer.write(response(b"no such model", 404))


async def repeat_the_key(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(response(f"bad key {seen.headers['authorization']}".encode(), 401))


def test_one_request_has_the_experts_own_settings_and_a_picture() -> None:
    fields = {"temperature": 0.5, "max_tokens": 300, "top_p": 0.9, "options": {"seed": 1}}
    found, asked = tried(answer("Ready.", after=0.05), **fields)
    (sent,) = (seen.fields for seen in asked)
    assert [sent[key] for key in ("model", "temperature", "max_tokens", "top_p", "seed")] == ["m", 0.5, 300, 0.9, 1]
    assert shows(asked[0])
    (line,) = (one.line for one in found if not one.is_problem)
    assert line.startswith('expert "Far": ready; URL answered in 0.') and line.endswith(
        "(10 + 2 tokens, with a picture)"
    )
    assert float(line.split(" in ")[1].split()[0]) >= 0.05


def test_every_endpoint_is_asked_whatever_the_caps_and_its_neighbours() -> None:
    async def scenario() -> None:
        async with ChatServer(answer("ready")) as one, ChatServer(send(b"", 503)) as other:
            caps = LimitsConfig(calls=1, tokens=1)
            config = dataclasses.replace(registry(one.url, other.url), limits=caps)
            found = await try_experts(config, 10.0)
            again = await try_experts(config, 10.0)
        assert [finding.is_problem for finding in found] == [finding.is_problem for finding in again] == [False, True]
        assert len(one.chats) == len(other.chats) == 4  # one fails, so all are asked without a picture too

    asyncio.run(scenario())


def test_only_who_is_shown_pictures_gets_one() -> None:
    _, asked = tried(blind, skill=READ)
    assert [shows(seen) for seen in asked] == [False]
    config = parse_registry(maestro.get_registry())
    assert all(is_shown_pictures(expert, config) for expert in config.experts)
    assert not is_shown_pictures(config.experts_by_name["glm_ocr"], registry("http://127.0.0.1:9/v1"))


def called_tools(*empty: str) -> bytes:
    """A reply that calls a tool; these fields of its message are null."""
    body = json.loads(completion(None, completion_tokens=30))
    calls = [{"id": "1", "type": "function", "function": {"name": "answer", "arguments": "{}"}}]
    body["choices"][0]["message"] = dict.fromkeys(empty) | {"role": "assistant", "tool_calls": calls}
    return json.dumps(body).encode()


PROBLEMS: dict[str, tuple[Behaviour, str]] = {
    "another model": (
        other_model,
        'HTTP 404; check endpoints (they usually end in /v1) and model; model is "m", and the server lists '
        'Chart-R1, ?[31mred (it says: "no such model")',
    ),
    "a wrong path": (send(b"", 404), 'HTTP 404; check endpoints (they usually end in /v1) and model; model is "m"'),
    "no key": (
        send(b"who?", 401),
        "HTTP 401; set the environment variable that `key` names to a valid key; this expert has no `key` "
        '(it says: "who?")',
    ),
    "a model of words": (
        blind,
        "it answers words and refuses a picture (HTTP 400); serve a model that sees, or name in `experts` of the "
        'skills that show pictures those that do (it says: "m is not a multimodal model")',
    ),
    "no reply in time": (
        hang,
        "no reply within 0.3 s; see whether its server is busy or still loads, lower max_tokens, or raise "
        "attempt_timeout or --seconds",
    ),
    "a slow drip": (drip, "no reply within 0.3 s; "),
    "nothing said": (
        send(completion(None, completion_tokens=1024)),
        "its reply is empty, of 1024 tokens; raise max_tokens (1024), or turn its thinking off by options",
    ),
    "nothing but thoughts": (send(completion("<think>hm</think>\n")), "its reply is empty, of 2 tokens; "),
    "calls of tools": (
        send(called_tools("content")),
        "its reply holds tool_calls and no content; start its server without a parser of tool calls (vLLM: without "
        '--enable-auto-tool-choice), or set options={"tool_choice": "none"}',
    ),
    "calls of tools without the field": (send(called_tools()), "its reply holds tool_calls and no content; start its"),
    "tokens that are no numbers": (
        send(completion("ready", prompt_tokens=-1)),
        "usage holds no numbers of tokens (Expected `int` >= 0 - at `$.prompt_tokens`); let its server (or what stands "
        "before it) report them, or leave usage out",
    ),
    "a number for a text": (
        send(completion(42)),
        "the body is not as it should be: Expected `str | array | null`, got `int` - at "
        "`$.choices[...].message.content`; let its server (or what stands before it) send a text",
    ),
    "a fault of the server": (send(b"oops", 500), "HTTP 500; look into its server's log"),
    "too much to do": (
        send(b"", 429),
        "HTTP 429; it has too much to do or a quota is used up; lower concurrency or wait",
    ),
    "another kind of server": (
        send(b"<html></html>"),
        "the body is no JSON; correct endpoints: what answers there is no OpenAI-compatible server",
    ),
}


def test_a_reply_without_usage_or_in_parts_is_ready_and_the_line_says_what_is_done() -> None:
    body = json.loads(completion([{"type": "text", "text": "rea"}, {"type": "text", "text": "dy."}]))
    del body["usage"]
    found, _ = tried(send(json.dumps(body).encode()), skill=READ)
    (line,) = (one.line for one in found if not one.is_problem)
    assert line.endswith(
        " s (about 7 + 2 tokens); its content is a list of parts, of which the texts are joined; it tells no usage: "
        "tokens are estimated, 1 for every 4 bytes of text and 1000 for an image"
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_has_its_cure(name: str) -> None:
    behaviour, line = PROBLEMS[name]
    found, _ = tried(behaviour, seconds=0.3 if behaviour in (hang, drip) else 10.0)
    assert [one.is_problem for one in found] == [True]
    assert found[0].line.startswith(f'expert "Far": URL: {line}')
    assert found[0].line.isprintable()


def test_the_experts_own_timeout_counts() -> None:
    found, _ = tried(hang, seconds=60.0, attempt_timeout=0.2)
    assert "no reply within 0.2 s" in found[0].line


def test_a_key_that_is_refused_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    found, _ = tried(repeat_the_key, key="CANARY")
    assert "which is CANARY here" in found[0].line and SECRET not in found[0].line


@pytest.mark.parametrize(
    ("fields", "cure"),
    [
        ({}, "start its server (or name the one that runs), or correct endpoints"),
        (
            {"serve": ("vllm", "serve")},
            "start its server (python -m maestro_jax.experts up does), or correct endpoints",
        ),
    ],
)
def test_a_server_that_is_down_can_be_started(fields: dict[str, Any], cure: str) -> None:
    async def scenario() -> None:
        async with refused() as url:
            (found,) = await try_experts(registry(url, **fields), 10.0)
            assert found.is_problem and found.line.startswith(f'expert "Far": {url}: no connection (')
            assert found.line.endswith(cure)

    asyncio.run(scenario())
