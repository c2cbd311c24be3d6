"""Which endpoint gets the next attempt, and how many it has at a time."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from maestro_jax.registry.experts.endpoints import Endpoint, Endpoints, NoEndpointError
from maestro_jax.registry.experts.retries import RetryConfig

URLS = ("http://a/v1/", "http://b/v1", "http://c/v1")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def end(seconds: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def make(concurrency: int = 8, urls: tuple[str, ...] = URLS) -> Endpoints:
    return Endpoints(urls, concurrency, RetryConfig(first=0.0), time.monotonic)


def running(endpoints: Endpoints) -> list[int]:
    return [endpoint.pressure.running for endpoint in endpoints.all]


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
        leases = [await endpoints.lease(end()) for _ in range(6)]
        assert sorted(lease.endpoint.url for lease in leases) == sorted(
            ["http://a/v1", "http://b/v1", "http://c/v1"] * 2
        )
        assert running(endpoints) == [2, 2, 2]
        for lease in leases:
            with lease:
                pass
        assert running(endpoints) == [0, 0, 0]

    run(scenario())


def test_the_one_with_least_to_do_is_next() -> None:
    async def scenario() -> None:
        endpoints = make()
        with await endpoints.lease(end()), await endpoints.lease(end()):
            for _ in range(2):
                with await endpoints.lease(end()) as third:
                    assert third.endpoint.url == "http://c/v1"

    run(scenario())


def test_one_that_was_tried_is_the_last_resort() -> None:
    async def scenario() -> None:
        endpoints = make(8, URLS[:2])
        first, second = endpoints.all
        with await endpoints.lease(end(), {first}) as found, await endpoints.lease(end(), {first}) as again:
            assert (found.endpoint, again.endpoint) == (second, second)
        trip(endpoints, 1)
        with await endpoints.lease(end(), {first}) as found:
            assert found.endpoint is first

    run(scenario())


def test_one_whose_breaker_is_open_is_left_alone() -> None:
    async def scenario() -> None:
        endpoints = make()
        trip(endpoints, 0)
        with await endpoints.lease(end()) as found:
            assert found.endpoint.url == "http://b/v1"
        for number in (1, 2):
            assert endpoints.admit
            trip(endpoints, number)
        assert not endpoints.admit
        with pytest.raises(NoEndpointError, match="keep failing"):
            await endpoints.lease(end())

    run(scenario())


def test_no_more_than_its_concurrency_at_a_time() -> None:
    async def scenario() -> None:
        endpoints, gate, most = make(2, URLS[:1]), asyncio.Event(), 0

        async def attempt() -> None:
            nonlocal most
            with await endpoints.lease(end()):
                most = max(most, *running(endpoints))
                await gate.wait()

        tasks = [asyncio.create_task(attempt()) for _ in range(7)]
        await settle()
        assert (most, running(endpoints)) == (2, [2])
        gate.set()
        await asyncio.gather(*tasks)
        assert (most, running(endpoints)) == (2, [0])

    run(scenario())


def test_those_who_wait_are_served_in_their_order() -> None:
    async def scenario() -> None:
        endpoints, served = make(1, URLS[:1]), []

        async def attempt(number: int) -> None:
            with await endpoints.lease(end()):
                served.append(number)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for number in range(9):
                group.create_task(attempt(number))
        assert served == list(range(9))

    run(scenario())


def test_no_turn_until_the_end_is_a_timeout() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:1])
        with await endpoints.lease(end()):
            with pytest.raises(TimeoutError):
                await endpoints.lease(end(0.01))
        assert running(endpoints) == [0]
        with await endpoints.lease(end()):
            pass  # the turn came back

    run(scenario())


def test_those_who_wait_hear_that_the_last_breaker_opened() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:1])
        first = await endpoints.lease(end())
        waiting = [asyncio.create_task(endpoints.lease(end())) for _ in range(3)]
        await settle()
        trip(endpoints, 0)
        with first:
            pass
        assert {type(found) for found in await asyncio.gather(*waiting, return_exceptions=True)} == {NoEndpointError}

    run(scenario())


def test_those_who_wait_go_elsewhere_when_the_breaker_opens() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:2])
        first, second = await endpoints.lease(end()), await endpoints.lease(end())
        waiting = asyncio.create_task(endpoints.lease(end()))
        await settle()
        trip(endpoints, 0)
        with first:
            pass
        await settle()
        assert not waiting.done()
        with second:
            pass
        with await waiting as found:
            assert found.endpoint.url == "http://b/v1"

    run(scenario())


def test_a_cancelled_wait_gives_up_its_place() -> None:
    async def scenario() -> None:
        endpoints = make(1, URLS[:1])
        with await endpoints.lease(end()):
            waiting = [asyncio.create_task(endpoints.lease(end())) for _ in range(2)]
            await settle()
            waiting[0].cancel()
            await settle()
        with await waiting[1]:
            assert running(endpoints) == [1]

    run(scenario())


def test_no_more_wait_for_connections_than_would_open_the_breaker() -> None:
    """Whoever comes meanwhile goes to another one, or waits: the cost of an endpoint that is gone is bounded."""

    async def scenario() -> None:
        endpoints = make(64, URLS[:2])
        first, second = endpoints.all
        leases = [await endpoints.lease(end()) for _ in range(10)]
        assert running(endpoints) == [5, 5]
        waiting = [asyncio.create_task(endpoints.lease(end())) for _ in range(10)]
        await settle()
        assert running(endpoints) == [5, 5]
        for lease in leases:
            if lease.endpoint is second:
                lease.connected()
        await settle()
        assert running(endpoints) == [5, 10]
        (failing, *_) = [lease for lease in leases if lease.endpoint is first]
        with failing:
            failing.failed("no connection")
        await settle()
        assert running(endpoints) == [4, 10]  # one more failure in a row: one place less
        for task in waiting:
            task.cancel()

    run(scenario())


# ---- back-pressure -------------------------------------------------------------------------------------------


def test_one_that_is_held_gets_nothing_and_the_other_takes_the_load() -> None:
    async def scenario() -> None:
        endpoints = make(2, URLS[:2])
        start = time.monotonic()
        with await endpoints.lease(end()) as lease:
            assert not lease.refused(0.05)
        found = [await endpoints.lease(end()) for _ in range(2)]
        assert {one.endpoint.url for one in found} == {"http://b/v1"}
        with await endpoints.lease(end()) as third:
            assert third.endpoint.url == "http://a/v1"
            assert time.monotonic() - start >= 0.05

    run(scenario())


def test_who_cannot_wait_so_long_hears_it_at_once() -> None:
    async def scenario() -> None:
        endpoints = make(2, URLS[:1])
        with await endpoints.lease(end()) as lease:
            lease.refused(20.0)
        with pytest.raises(NoEndpointError, match="busy"):
            await endpoints.lease(end(10.0))

    run(scenario())


def test_only_refusals_in_vain_trip_the_breaker() -> None:
    async def refuse(endpoint: Endpoint, endpoints: Endpoints) -> bool:
        with await endpoints.lease(end()) as lease:
            return lease.refused(0.0)

    async def scenario() -> None:
        endpoints = make(4, URLS[:1])
        (endpoint,) = endpoints.all
        for _ in range(30):  # each time somebody is served in between
            assert not await refuse(endpoint, endpoints)
            with await endpoints.lease(end()) as lease:
                lease.succeeded()
        assert endpoint.breaker.admits
        assert [await refuse(endpoint, endpoints) for _ in range(6)] == [False] + [True] * 5
        assert not endpoint.breaker.admits

    run(scenario())
