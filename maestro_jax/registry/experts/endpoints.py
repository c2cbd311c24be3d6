"""The endpoints of an expert: which one gets the next attempt, and how many it has at a time.

In: attempts. Out: a lease on the endpoint with the fewest attempts under way among those whose breaker admits one and
which have room. Where none has room, attempts wait in line. An endpoint has no room while as many attempts wait for
their connections as would open its breaker: whatever a dead one costs, it costs so many. Of one event loop; nothing is
locked.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence

from maestro_jax.registry.experts.breaker import Breaker, BreakerConfig, BreakerState, Permit
from maestro_jax.registry.experts.pressure import Pressure
from maestro_jax.registry.experts.retries import RetryConfig

_TICK = 0.001  # seconds; an event loop's timer may come a little early


class Endpoint:
    """One server.

    Args:
      url: base URL, such as "http://127.0.0.1:8000/v1".

    Attributes:
      connecting: attempts under way that have no connection yet.
      fault: of the latest attempt that failed, a few words.
      probes: how many have been sent.
    """

    def __init__(self, url: str, breaker: Breaker, pressure: Pressure):
        self.url = url.rstrip("/")
        self.breaker = breaker
        self.pressure = pressure
        self.connecting = 0
        self.fault = ""
        self.probes = 0

    @property
    def has_room(self) -> bool:
        return self.pressure.has_room and self.connecting < self.breaker.failures_left


class NoEndpointError(Exception):
    """No endpoint may be asked in time; the text says why."""


class Lease:
    """Leave for one attempt on `endpoint`, until the block ends. The holder says when it has a connection, and how it
    ended; unless it does, it was abandoned.
    """

    def __init__(self, endpoint: Endpoint, permit: Permit, wake: Callable[[Endpoint], None]):
        self.endpoint = endpoint
        self.is_connected = False
        self._permit, self._wake = permit, wake
        self._round = endpoint.pressure.rounds
        endpoint.pressure.running += 1
        endpoint.connecting += 1

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *raised: object) -> None:
        self.endpoint.breaker.abandoned(self._permit)
        self.endpoint.pressure.running -= 1
        self.endpoint.connecting -= not self.is_connected
        self._wake(self.endpoint)

    def connected(self) -> None:
        """The attempt has a connection."""
        if not self.is_connected:
            self.is_connected = True
            self.endpoint.connecting -= 1
            self._wake(self.endpoint)

    def succeeded(self) -> None:
        self.endpoint.pressure.served()
        self.endpoint.breaker.succeeded(self._permit)

    def failed(self, fault: str) -> None:
        self.endpoint.fault = fault
        self.endpoint.breaker.failed(self._permit)

    def faulted(self, fault: str) -> None:
        """The server answered a probe, but not well (see `Breaker.faulted`)."""
        self.endpoint.fault = fault
        self.endpoint.breaker.faulted(self._permit)

    def refused(self, retry_after: float) -> bool:
        """The server is too busy; says whether that is a failure (see `Pressure.refused`)."""
        is_failure = self.endpoint.pressure.refused(self._round, retry_after)
        if is_failure:
            self.failed("too busy to serve anybody")
        return is_failure


class Endpoints:
    """All servers of an expert.

    Args:
      concurrency: attempts that each gets at a time; further ones wait.
      clock: that of the event loop.
    """

    def __init__(self, urls: Sequence[str], concurrency: int, retries: RetryConfig, clock: Callable[[], float]):
        self.all = [
            Endpoint(url, Breaker(BreakerConfig(), clock), Pressure(concurrency, retries, clock)) for url in urls
        ]
        self._clock = clock
        self._line: deque[asyncio.Event] = deque()  # of those who wait; the first one looks whenever it is woken

    @property
    def admit(self) -> bool:
        """Whether any of them may be asked now."""
        return any(endpoint.breaker.admits for endpoint in self.all)

    @property
    def shunned(self) -> str:
        """Why none of them is asked as usual; empty where one is. May be called from any thread."""
        if any(endpoint.breaker.state is BreakerState.CLOSED for endpoint in self.all):
            return ""
        return "every endpoint is left alone: " + ", ".join(f"{one.url} ({one.fault})" for one in self.all)

    async def lease(self, end: float, tried: Collection[Endpoint] = ()) -> Lease:
        """An endpoint and leave for one attempt on it, once it is its turn.

        Args:
          end: until when to wait for a turn, as the clock counts.
          tried: those that have failed the request; they get it again only if no other has room.

        Raises:
          NoEndpointError: the breakers of all are open, or all are held until after `end`; also for those who waited
            when that came.
          TimeoutError: there was no turn until `end`.
        """
        endpoint = None if self._line else self._with_room(end, tried)
        endpoint = endpoint or await self._turn(end, tried)
        permit = endpoint.breaker.acquire()
        assert permit is not None  # `_with_room` gives those whose breaker admits
        return Lease(endpoint, permit, self._wake_for)

    async def probe(self, endpoint: Endpoint) -> Lease | None:
        """Leave for a probe, once it is time for one; None as soon as the endpoint is asked as usual."""
        while endpoint.breaker.state is not BreakerState.CLOSED:
            held = endpoint.pressure.held_until - self._clock()
            await asyncio.sleep(max(held, endpoint.breaker.probe_in) + _TICK)
            if permit := endpoint.breaker.probe():
                endpoint.probes += 1
                return Lease(endpoint, permit, self._wake_for)
        return None

    async def _turn(self, end: float, tried: Collection[Endpoint]) -> Endpoint:
        """Waits in line."""
        woken = asyncio.Event()
        self._line.append(woken)
        try:
            async with asyncio.timeout_at(end):
                while True:
                    if self._line[0] is woken and (endpoint := self._with_room(end, tried)):
                        return endpoint
                    woken.clear()
                    await woken.wait()
        finally:
            self._line.remove(woken)
            self._wake()

    def _with_room(self, end: float, tried: Collection[Endpoint]) -> Endpoint | None:
        """The one for the next attempt; None if it has to wait."""
        admitting = [endpoint for endpoint in self.all if endpoint.breaker.admits]
        roomy = [endpoint for endpoint in admitting if endpoint.has_room]
        if len(roomy) > 1:
            return min(roomy, key=lambda endpoint: (endpoint in tried, endpoint.pressure.running))
        if roomy:
            return roomy[0]
        if not admitting:
            raise NoEndpointError("its endpoints keep failing and are left alone for a while")
        if all(endpoint.pressure.held_until > end for endpoint in admitting):
            raise NoEndpointError("its endpoints are busy and ask to be left alone until after the deadline")
        return None

    def _wake_for(self, endpoint: Endpoint) -> None:
        """It may have room now, or has it once it is held no longer."""
        held = endpoint.pressure.held_until
        if held and (seconds := held - self._clock()) > 0:
            asyncio.get_running_loop().call_later(seconds + _TICK, self._wake)
        self._wake()

    def _wake(self) -> None:
        if self._line:
            self._line[0].set()
