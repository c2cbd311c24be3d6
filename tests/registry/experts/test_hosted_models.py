"""Hosted reasoning models: they refuse what others want, so our own fields go by another name, or are left out."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from maestro_jax.fleet.trials import try_experts
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.interface import Message, Request, Sampling
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.registry.experts.http import HttpExpert, http_identity
from maestro_jax.registry.experts.retries import RetryBudget
from maestro_jax.types import Call, Status
from tests.registry.servers import ChatServer, Seen, answer, response

Raw = Callable[..., dict[str, Any]]
RENAME = {"max_tokens": "max_completion_tokens", "temperature": "", "top_p": ""}
MESSAGES = (Message("user", "how many?"),)


async def reasons(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Refuses as hosted reasoning models do."""
    refused = {"max_tokens", "temperature", "top_p"} & seen.fields.keys()
    if not refused:
        await answer("42")(seen, writer)
        return
    said = f"Unsupported parameter: '{min(refused)}' is not supported with this model."
    writer.write(response(json.dumps({"error": {"message": said, "type": "invalid_request_error"}}).encode(), 400))


def served(url: str, **fields: Any) -> dict[str, Any]:
    return {"name": "Served", "description": "", "endpoints": (url,), "model": "m", "max_tokens": 9} | fields


def expert(url: str, **fields: Any) -> HttpExpert:
    return HttpExpert(ExpertConfig(**served(url, **fields)), RetryBudget(lambda: 0.0))


def test_what_a_server_refuses_goes_by_its_name_or_is_left_out() -> None:
    async def scenario() -> None:
        async with ChatServer(reasons) as server:
            made = expert(server.url, rename=RENAME, options={"reasoning_effort": "low"})
            replies = [await made.ask(Request(MESSAGES)), await made.ask(Request(MESSAGES, Sampling(0.0, 5)))]
            await made.close()
        assert [reply.text for reply in replies] == ["42", "42"]
        own, other = (seen.fields for seen in server.requests)
        assert own.keys() == {"model", "messages", "stream", "max_completion_tokens", "reasoning_effort"}
        assert (own["max_completion_tokens"], other["max_completion_tokens"]) == (9, 5)

    asyncio.run(scenario())


def test_the_cure_is_named_where_a_field_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with ChatServer(reasons) as server:
            made = expert(server.url)
            assert (await made.ask(Request(MESSAGES))).status is Status.CONFIG_ERROR
            await made.close()

    asyncio.run(scenario())
    assert "'max_tokens' is not supported" in caplog.text and "or none, in `rename`" in caplog.text


@pytest.mark.parametrize(("fields", "problem"), [({"rename": RENAME}, False), ({}, True)])
def test_a_trial_asks_as_a_run_does(raw: Raw, fields: dict[str, Any], problem: bool) -> None:
    async def scenario() -> None:
        async with ChatServer(reasons) as server:
            (finding,) = await try_experts(parse_registry(raw(experts=(served(server.url, **fields),))), 5.0)
        assert finding.is_problem is problem and ("`rename`" in finding.line) is problem

    asyncio.run(scenario())


def test_replies_of_a_temperature_that_is_not_sent_are_not_shared(raw: Raw) -> None:
    """The server's own one is hardly 0."""

    async def scenario() -> None:
        async with ChatServer(reasons) as server:
            registry = Registry(parse_registry(raw(experts=(served(server.url, rename=RENAME),))))
            for _ in range(3):
                assert (await registry.call(Call("Served", "Plain_Solver", "x"), "q", (), 5.0)).text == "42"
            await registry.close()
        assert len(server.requests) == 3

    asyncio.run(scenario())


def test_names_of_fields_belong_to_what_decides_a_reply_and_others_keep_their_kept_replies() -> None:
    def identity(**fields: Any) -> str:
        return http_identity(ExpertConfig(**served("http://127.0.0.1:1/v1", **fields)))

    assert identity() == "http Served m (0.0, 9, 1.0) {}"  # as it was before there were names
    renamed = [{}, {"max_tokens": "n"}, {"top_p": ""}, RENAME]
    assert len({identity(rename=rename) for rename in renamed}) == len(renamed)
