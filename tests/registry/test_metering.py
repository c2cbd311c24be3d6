"""Counters of experts, and the caps of a run."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maestro_jax.registry.config import LimitsConfig
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.interface import Reply
from maestro_jax.registry.journal import Journal
from maestro_jax.registry.metering import ExpertCounter, Latencies, LimitError, Spending
from maestro_jax.registry.reading import parse_registry
from maestro_jax.types import Call, Status, Task, Usage
from maestro_jax.warm_start.demonstrations import make_calls
from tests.registry.servers import ChatServer, answer, send

Raw = Callable[..., dict[str, Any]]
CALL = Call("Echo-One", "Plain_Solver", "the dots")


def test_quantiles_are_known_to_a_percent() -> None:
    latencies, draw = Latencies(), random.Random(0)
    seconds = sorted(draw.lognormvariate(0.0, 2.0) for _ in range(10_000))
    for value in seconds:
        latencies.add(value)
    for share in (0.5, 0.95, 0.99):
        assert latencies.quantile(share) == pytest.approx(seconds[int(share * 10_000) - 1], rel=0.011)


def test_quantiles_of_nothing_and_of_zero() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.5) == 0.0
    latencies.add(0.0)
    assert latencies.quantile(0.99) == pytest.approx(0.0, abs=1e-5)


def test_a_counter_adds_up() -> None:
    counter = ExpertCounter()
    counter.add(Reply("x", Status.OK, Usage(10, 2, 0.5), 1.0))
    counter.add(Reply("", Status.TIMEOUT, Usage(), 3.0))
    found = counter.to_json()
    assert (found["calls"], found["success"], found["statuses"]) == (2, 0.5, {"OK": 1, "TIMEOUT": 1})
    assert (found["prompt_tokens"], found["completion_tokens"], found["price"]) == (10, 2, 0.5)
    assert found["p50_seconds"] == pytest.approx(1.0, rel=0.01) and found["p99_seconds"] == pytest.approx(3.0, rel=0.01)


def spend(limits: LimitsConfig) -> tuple[int, Spending]:
    """How many requests of 15 tokens and a quarter of a dollar may go out, of a hundred."""
    spending, begun = Spending(limits), 0
    for _ in range(100):
        if spending.begin():
            begun += 1
            spending.add(Usage(10, 5, 0.25))
    return begun, spending


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        (LimitsConfig(), 100),
        (LimitsConfig(calls=7), 7),
        (LimitsConfig(tokens=31), 3),
        (LimitsConfig(price=1.0), 4),
        (LimitsConfig(calls=50, tokens=30), 2),
    ],
)
def test_a_cap_stops_further_requests(limits: LimitsConfig, allowed: int) -> None:
    begun, spending = spend(limits)
    assert begun == allowed
    if allowed < 100:
        with pytest.raises(LimitError):
            spending.check()


def test_the_error_names_the_cap_and_the_cure() -> None:
    _, spending = spend(LimitsConfig(price=1.0))
    with pytest.raises(
        LimitError, match=r"cap config\.registry\.limits\.price=1\.0; .*raise config\.registry\.limits\.price"
    ):
        spending.check()


def test_a_cap_that_is_met_but_not_exceeded_stops_nothing() -> None:
    spending = Spending(LimitsConfig(calls=1))
    assert spending.begin()
    spending.check()


# ---- in the registry ---------------------------------------------------------------------------------------


def test_an_in_process_expert_is_capped_too(raw: Raw, specialists: ModuleType) -> None:
    dispatcher = Dispatcher(Registry(parse_registry(raw(limits={"calls": 3}))))
    try:
        tasks = [(_task(), Call("Echo-One", "Plain_Solver", str(number))) for number in range(10)]
        with pytest.raises(LimitError, match="limits.calls=3"):
            make_calls(dispatcher, tasks, 30.0, lambda count: None)
    finally:
        dispatcher.close()
    assert specialists.Echo.asked <= 3


def _task() -> Task:
    return Task("t", "how many?", (), (), "counting")


def test_refused_calls_come_back_as_infrastructure_failures(raw: Raw) -> None:
    dispatcher = Dispatcher(Registry(parse_registry(raw(limits={"calls": 1}))))
    for ticket in range(3):
        dispatcher.submit(ticket, Call("Echo-One", "Plain_Solver", str(ticket)), "q", (), 30.0)
    found: dict[int, Any] = {}
    while len(found) < 3:
        assert dispatcher.wait(10.0)
        found.update(dispatcher.collect())
    dispatcher.close()
    assert sorted(o.status for o in found.values()) == [Status.OK, Status.UNAVAILABLE, Status.UNAVAILABLE]
    with pytest.raises(LimitError):
        dispatcher.check()


def test_a_run_that_goes_on_has_spent_what_its_journal_holds(raw: Raw, tmp_path: Path) -> None:
    """All of it: also what was asked in sections that a later life began again."""
    path = tmp_path / "journal.jsonl"

    def live(limits: dict[str, float], asked: int) -> Spending:
        """A process that begins step 2 again and asks so often for what no cache has; killed, its caches are lost."""
        journal = Journal(str(path))
        registry = Registry(parse_registry(raw(limits=limits)), journal=journal)
        journal.begin("step 2")

        async def scenario() -> None:
            for number in range(asked):
                await registry.call(Call("Echo-One", "Text_Solver", ""), str(number), (b"png",), 30.0)
            await registry.close()

        asyncio.run(scenario())
        journal.close()
        return registry.spending

    first = live({"calls": 100}, 3)
    with open(path, "ab") as file:
        file.write(b'{"kind": "request", "name": "Echo-One", "usa')  # torn by the kill
    second = live({"calls": 100}, 2)
    assert second.calls == first.calls + 2 == 5  # the service of this process is none
    assert second.usage.prompt_tokens > first.usage.prompt_tokens > 0
    assert second.usage.price == pytest.approx(5 / 3 * first.usage.price) and first.usage.price > 0
    for limits in ({"calls": 5}, {"tokens": 1}, {"price": 1.5 * first.usage.price}):
        with pytest.raises(LimitError):
            live(limits, 1)


def test_replies_from_the_cache_cost_nothing(raw: Raw) -> None:
    registry = Registry(parse_registry(raw(limits={"calls": 1})))

    async def scenario() -> None:
        for _ in range(5):
            assert (await registry.call(CALL, "q", (), 30.0)).status is Status.OK
        await registry.close()

    asyncio.run(scenario())
    report = registry.report()["Echo-One"]
    assert (report["calls"], report["cache_hits"], report["success"]) == (1, 4, 1.0)


def served(url: str, **fields: Any) -> dict[str, Any]:
    return {"name": "Served", "description": "", "endpoints": (url,), "model": "m", **fields}


def test_the_report_has_what_breakers_did(raw: Raw) -> None:
    async def scenario() -> dict[str, Any]:
        async with ChatServer(send(b"", 500)) as server:
            registry = Registry(parse_registry(raw(experts=(served(server.url),))))
            for _ in range(6):
                await registry.call(Call("Served", "Plain_Solver", "x"), "q", (), 0.2)
            await registry.close()
            return registry.report()["Served"]

    began = time.monotonic()
    report = asyncio.run(scenario())
    (changes,) = report["breakers"].values()
    ((seconds, state),) = changes
    assert state == "open" and 0.0 <= seconds <= time.monotonic() - began
    assert report["statuses"] == {"UNAVAILABLE": 6} and report["success"] == 0.0


def test_tokens_and_prices_of_servers_count(raw: Raw) -> None:
    async def scenario() -> dict[str, Any]:
        async with ChatServer(answer("42")) as server:
            expert = served(server.url, price_prompt=1.0, price_completion=5.0)
            registry = Registry(parse_registry(raw(experts=(expert,), limits={"price": 1.5e-5})))
            await registry.call(Call("Served", "Plain_Solver", "a"), "q", (), 5.0)
            with pytest.raises(LimitError, match="limits.price"):
                await registry.call(Call("Served", "Plain_Solver", "b"), "q", (), 5.0)
            await registry.close()
            return registry.report()["Served"]

    report = asyncio.run(scenario())
    assert (report["prompt_tokens"], report["completion_tokens"]) == (10, 2)
    assert report["price"] == pytest.approx(2e-5)


def test_processes_share_what_is_left_of_a_cap(raw: Raw, tmp_path: Path) -> None:
    """However many there have been, and are now."""
    first, second = Journal(str(tmp_path / "journal.jsonl")), Journal(str(tmp_path / "journal.1.jsonl"))
    config = parse_registry(raw(limits={"calls": 10}))

    async def ask(registry: Registry) -> int:
        """How often experts may be asked."""
        for number in itertools.count():
            try:
                await registry.call(Call("Echo-One", "Plain_Solver", f"{number}"), "q", (), 30.0)
            except LimitError as error:
                assert "config.registry.limits.calls=" in str(error)
                await registry.close()
                return number

    alone = Registry(parse_registry(raw(limits={"calls": 4})), journal=first)
    assert asyncio.run(ask(alone)) == 4
    pair = [Registry(config, journal=journal, processes=2) for journal in (first, second)]
    assert [asyncio.run(ask(registry)) for registry in pair] == [3, 3]
    assert asyncio.run(ask(Registry(config, journal=first))) == 0
