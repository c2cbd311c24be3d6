"""Back-pressure of an endpoint: how many attempts it takes at a time, and until when it wants none. No I/O.

In: attempts that were refused since the server is busy (429, or 503 with Retry-After), and those that were served. Out:
whether there is room for another one now. A refusal is no fault: the endpoint is left alone until the time it names.
Then it gets no more at a time than it was serving when it refused, and twice as many after each quiet while, up to its
concurrency. Only one that refuses again and again, and serves nobody in between, is as good as broken.
"""

import random
from collections.abc import Callable

from maestro_jax.registry.experts.retries import RetryConfig

QUIET_SECONDS = 5.0  # without a refusal, before the window doubles


class Pressure:
    """State of one endpoint.

    Args:
      concurrency: most attempts at a time.
      retries: how long to wait where the server names no time, or a shorter one.
      clock: seconds, monotonic.
      draw: a random number between 0 and 1.

    Attributes:
      running: attempts under way.
      held_until: when it may be asked again.
      rounds: holds so far. An attempt belongs to the round in which it began.
      in_vain: of them, the latest in a row in which nobody was served.
    """

    def __init__(
        self,
        concurrency: int,
        retries: RetryConfig,
        clock: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ):
        self.running = 0
        self.held_until = 0.0
        self.rounds = 0
        self.in_vain = 0
        self._concurrency = self._window = concurrency
        self._retries, self._clock, self._draw = retries, clock, draw
        self._grows_at = 0.0

    @property
    def has_room(self) -> bool:
        if self._window < self._concurrency and (now := self._clock()) >= self._grows_at:
            self._window = min(2 * self._window, self._concurrency)
            self._grows_at = now + QUIET_SECONDS
        return self.running < self._window and (not self.held_until or self._clock() >= self.held_until)

    def served(self) -> None:
        self.in_vain = 0

    def refused(self, began_in: int, retry_after: float) -> bool:
        """An attempt, which is still counted in `running`, was refused.

        Args:
          began_in: the round in which it began.
          retry_after: seconds that the server asked to be left alone; 0 if it named none.

        Returns:
          Whether that is a failure: the first refusal of a round, when nobody was served since the round before.
        """
        self._window = min(self._window, max(1, self.running - 1))
        first = began_in == self.rounds
        if first:
            self.rounds += 1
            self.in_vain += 1
            seconds = self._retries.wait(self.in_vain, retry_after, self._draw)
        else:
            seconds = self._retries.obeyed(retry_after)
        self.held_until = max(self.held_until, self._clock() + seconds)
        self._grows_at = self.held_until + QUIET_SECONDS
        return first and self.in_vain > 1
