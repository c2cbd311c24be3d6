"""R14 of the design: at default settings, a dead endpoint beside a live one costs a run at most five slow requests."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from configs import quickstart
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Registry
from maestro_jax.registry.experts import endpoints, http
from maestro_jax.registry.experts.breaker import BreakerConfig
from maestro_jax.registry.experts.retries import RetryBudget, RetryConfig
from maestro_jax.types import Call, Observation, Status
from tests.registry.experts.test_http_faults import run
from tests.registry.servers import ChatServer, answer, unreachable

Raw = Callable[..., dict[str, Any]]
SCALE = 0.05  # of all seconds: connecting may take 0.25 s
CONNECT = SCALE * http.CONNECT_SECONDS
ATTEMPT = SCALE * ExpertConfig("E", "").attempt_timeout
DEADLINE = SCALE * quickstart.get_config().rollout.deadline
MOST_SLOW = 5


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default settings at another scale of time."""
    breaker, retries = BreakerConfig(), RetryConfig()
    times = {name: SCALE * getattr(breaker, name) for name in ("window", "first", "longest")}
    monkeypatch.setattr(endpoints, "BreakerConfig", functools.partial(BreakerConfig, **times))
    monkeypatch.setattr(http, "CONNECT_SECONDS", CONNECT)
    quick = RetryConfig(first=SCALE * retries.first, longest=SCALE * retries.longest)
    monkeypatch.setattr(http.HttpExpert.__init__, "__defaults__", (quick,))
    monkeypatch.setattr(RetryBudget, "rate", RetryBudget.rate / SCALE)


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> list[http.Outcome]:
    """What became of attempts of requests on the dead endpoint: all others are good."""
    attempt, outcomes = http.HttpExpert._attempt, list[http.Outcome]()

    async def noted(*told: Any) -> http.Outcome:
        outcome = await attempt(*told)
        if outcome.status is not Status.OK:
            outcomes.append(outcome)
        return outcome

    monkeypatch.setattr(http.HttpExpert, "_attempt", noted)
    return outcomes


def two(raw: Raw, dead: str, alive: str) -> Registry:
    served = {"name": "Served", "description": "", "endpoints": (dead, alive), "model": "m", "attempt_timeout": ATTEMPT}
    return Registry(parse_registry(raw(experts=(served,))))


def states(registry: Registry, url: str) -> list[str]:
    return [state for _, state in registry.report()["Served"]["breakers"][url]]


@pytest.mark.parametrize("at_a_time", [1, 4, 64])
def test_at_most_five_requests_pay_for_a_dead_endpoint(raw: Raw, paid: list[http.Outcome], at_a_time: int) -> None:
    assert DEADLINE == ATTEMPT  # what an episode has left is always less than an attempt may take

    async def scenario() -> None:
        with unreachable() as dead:
            async with ChatServer(answer("42")) as alive:
                registry, observed = two(raw, dead, alive.url), list[Observation]()
                for begin in range(0, max(20, 3 * at_a_time), at_a_time):
                    calls = [Call("Served", "Plain_Solver", str(begin + i)) for i in range(at_a_time)]
                    observed += await asyncio.gather(*(registry.call(call, "q", (), DEADLINE) for call in calls))
                assert {observation.status for observation in observed} == {Status.OK}
                assert len(paid) <= MOST_SLOW
                assert states(registry, dead)[0] == "open"
                await registry.close()

    run(scenario)


def test_the_report_shows_that_a_dead_endpoint_was_left_alone_and_came_back(raw: Raw, paid: list[http.Outcome]) -> None:
    async def scenario() -> None:
        observed = list[Observation]()

        async def ask(count: int) -> None:
            for i in range(count):
                call = Call("Served", "Plain_Solver", f"{len(observed) + i}")
                observed.append(await registry.call(call, "q", (), DEADLINE))

        async with ChatServer(answer("42")) as alive:
            with unreachable() as dead:
                registry = two(raw, dead, alive.url)
                await ask(20)
                assert states(registry, dead)[0] == "open"
            async with ChatServer(answer("42"), port=int(dead.split(":")[2].removesuffix("/v1"))) as back:
                async with asyncio.timeout(5.0):
                    while states(registry, dead)[-1] != "closed":
                        await asyncio.sleep(0.01)
                await ask(20)
                assert back.requests[1:]  # the probe, and then its share
                assert {observation.status for observation in observed} == {Status.OK} and len(paid) <= MOST_SLOW
                assert states(registry, dead)[0] == "open" and states(registry, dead)[-1] == "closed"
                await registry.close()

    run(scenario)
