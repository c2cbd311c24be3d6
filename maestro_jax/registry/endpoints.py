"""The endpoints of an expert: which one gets the next attempt, and how many it has at a time.

In: attempts. Out: a lease on the endpoint with the fewest outstanding attempts among those whose breaker admits one.
Of one event loop; nothing is locked.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from maestro_jax.registry.breaker import Breaker, BreakerConfig, Permit


class Endpoint:
    """One server.

    Args:
      url: base URL, such as "http://127.0.0.1:8000/v1".
      concurrency: attempts it gets at a time; further ones wait.
    """

    def __init__(self, url: str, concurrency: int, breaker: Breaker):
        self.url = url.rstrip("/")
        self.breaker = breaker
        self.outstanding = 0  # attempts that run or wait for their turn
        self.turns = asyncio.Semaphore(concurrency)


class NoEndpointError(Exception):
    """The breakers of all endpoints are open."""


class Endpoints:
    """All servers of an expert."""

    def __init__(self, urls: Sequence[str], concurrency: int, clock: Callable[[], float]):
        self.all = [Endpoint(url, concurrency, Breaker(BreakerConfig(), clock)) for url in urls]

    @property
    def admit(self) -> bool:
        """Whether any of them may be asked now."""
        return any(endpoint.breaker.admits for endpoint in self.all)

    @contextlib.asynccontextmanager
    async def lease(self, end: float, tried: Collection[Endpoint] = ()) -> AsyncIterator[tuple[Endpoint, Permit]]:
        """An endpoint and leave for one attempt on it, once it is its turn.

        The holder reports to the endpoint's breaker how the attempt ended; unless it does, it was abandoned.

        Args:
          end: until when to wait for a turn, as the event loop counts.
          tried: those that have failed the request; they get it again only if no other admits it.

        Raises:
          NoEndpointError: also for those who waited when the last breaker opened.
          TimeoutError: there was no turn until `end`.
        """
        while True:
            endpoint = self._least_outstanding(tried)
            endpoint.outstanding += 1
            try:
                # A timer costs; most turns are free at once.
                async with asyncio.timeout_at(end) if endpoint.turns.locked() else contextlib.nullcontext():
                    await endpoint.turns.acquire()
                try:
                    # While it waited, the breaker may have opened.
                    if (permit := endpoint.breaker.acquire()) is not None:
                        try:
                            yield endpoint, permit
                        finally:
                            endpoint.breaker.abandoned(permit)
                        return
                finally:
                    endpoint.turns.release()
            finally:
                endpoint.outstanding -= 1

    def _least_outstanding(self, tried: Collection[Endpoint]) -> Endpoint:
        admitting = [endpoint for endpoint in self.all if endpoint.breaker.admits]
        if not admitting:
            raise NoEndpointError
        return min(admitting, key=lambda endpoint: (endpoint in tried, endpoint.outstanding))
