"""Which endpoint gets the next attempt, and how many it has at a time."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from maestro_jax.registry.endpoints import Endpoints, NoEndpointError

URLS = ("http://a/v1/", "http://b/v1", "http://c/v1")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def end(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def make(concurrency: int = 8, urls: tuple[str, ...] = URLS) -> Endpoints:
    return Endpoints(urls, concurrency, time.monotonic)


def trip(endpoints: Endpoints, number: int) -> None:
    breaker = endpoints.all[number].breaker
    for _ in range(5):
        permit = breaker.acquire()
        assert permit
        breaker.failed(permit)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_attempts_spread_over_endpoints() -> None:
    async def scenario() -> None:
        endpoints = make()
        leases = [endpoints.lease(end()) for _ in range(6)]
        urls = [(await lease.__aenter__())[0].url for lease in leases]
        assert sorted(urls) == [
            "http://a/v1",
            "http://a/v1",
            "http://b/v1",
            "http://b/v1",
            "http://c/v1",
            "http://c/v1",
        ]
        for lease in leases:
            await lease.__aexit__(None, None, None)
        assert [e.outstanding for e in endpoints.all] == [0, 0, 0]

    run(scenario())


def test_the_one_with_least_to_do_is_next() -> None:
    async def scenario() -> None:
        endpoints = make()
        async with endpoints.lease(end()), endpoints.lease(end()):
            async with endpoints.lease(end()) as (third, _):
                assert third.url == "http://c/v1"
            async with endpoints.lease(end()) as (again, _):
                assert again.url == "http://c/v1"

    run(scenario())


def test_one_that_was_tried_is_the_last_resort() -> None:
    async def scenario() -> None:
        endpoints = make(8, URLS[:2])
        first, second = endpoints.all
        async with endpoints.lease(end(), {first}) as (found, _), endpoints.lease(end(), {first}) as (again, _):
            assert (found, again) == (second, second)
        trip(endpoints, 1)
        async with endpoints.lease(end(), {first}) as (found, _):
            assert found is first

    run(scenario())


def test_one_whose_breaker_is_open_is_left_alone() -> None:
    async def scenario() -> None:
        endpoints = make()
        trip(endpoints, 0)
        async with endpoints.lease(end()) as (found, _):
            assert found.url == "http://b/v1"
        for number in (1, 2):
            assert endpoints.admit
            trip(endpoints, number)
        assert not endpoints.admit
        with pytest.raises(NoEndpointError):
            async with endpoints.lease(end()):
                pass

    run(scenario())


def test_no_more_than_its_concurrency_at_a_time() -> None:
    async def scenario() -> None:
        endpoints, gate, most = make(2, URLS[:1]), asyncio.Event(), 0
        running = 0

        async def attempt() -> None:
            nonlocal running, most
            async with endpoints.lease(end()):
                running += 1
                most = max(most, running)
                await gate.wait()
                running -= 1

        tasks = [asyncio.create_task(attempt()) for _ in range(7)]
        await settle()
        assert (most, endpoints.all[0].outstanding) == (2, 7)
        gate.set()
        await asyncio.gather(*tasks)
        assert (most, endpoints.all[0].outstanding) == (2, 0)

    run(scenario())


def test_no_turn_until_the_end_is_a_timeout() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:1])
        async with endpoints.lease(end()):
            with pytest.raises(TimeoutError):
                async with endpoints.lease(end(0.01)):
                    pass
        assert endpoints.all[0].outstanding == 0
        async with endpoints.lease(end()):
            pass  # the turn came back

    run(scenario())


def test_those_who_wait_go_elsewhere_when_the_breaker_opens() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:2])
        first, second = endpoints.lease(end()), endpoints.lease(end())
        await first.__aenter__()
        await second.__aenter__()
        found: list[str] = []

        async def wait() -> None:
            async with endpoints.lease(end()) as (endpoint, _):
                found.append(endpoint.url)

        waiting = asyncio.create_task(wait())  # for the first endpoint
        await settle()
        trip(endpoints, 0)
        await first.__aexit__(None, None, None)
        await settle()
        await second.__aexit__(None, None, None)
        await waiting
        assert found == ["http://b/v1"]

    run(scenario())


def test_a_cancelled_wait_gives_up_its_place() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:1])
        async with endpoints.lease(end()):

            async def wait() -> None:
                async with endpoints.lease(end()):
                    pass

            waiting = asyncio.create_task(wait())
            await settle()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert endpoints.all[0].outstanding == 1

    run(scenario())
