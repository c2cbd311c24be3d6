"""The circuit breaker of an endpoint: one that keeps failing is left alone for a while.

In: how attempts ended. Out: whether another one may go out now. Closed, it counts failures; open, it lets no request
through. Once its time is up, a probe decides, which is no request of anybody's: nobody has to wait for a server that is
still dead. Half-open, the server answers the probe with a fault of its own, which may be the probe's: a single request
decides. No clock of its own, no I/O.

Pattern: M. Nygard, "Release It!" (2nd ed., 2018), chapter 5.
"""

import dataclasses
import enum
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

KEPT_CHANGES = 1000  # of state, the latest


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"
    HALF_OPEN = "half-open"


@dataclasses.dataclass(frozen=True)
class BreakerConfig:
    """When a breaker opens, and for how long; times in seconds.

    Attributes:
      in_a_row: so many failures one after the other open it.
      share, least, window: so does this share of failures among at least so many attempts of the latest seconds.
      first, longest: it is probed after `first`, and after twice as long each time until a request succeeds, at most
        `longest`. A probe is cheap: a server that is back is not to wait for minutes.
    """

    in_a_row: int = 5
    share: float = 0.5
    least: int = 20
    window: float = 30.0
    first: float = 5.0
    longest: float = 30.0


class Permit(NamedTuple):
    """Leave for one attempt; goes back to the breaker with how the attempt ended."""

    epoch: int
    is_probe: bool = False


class Breaker:
    """State of one endpoint.

    Args:
      clock: seconds, monotonic.

    Attributes:
      changes: (seconds, state) whenever the state changed.
    """

    def __init__(self, config: BreakerConfig, clock: Callable[[], float]):
        self.state = BreakerState.CLOSED
        self.changes: deque[tuple[float, BreakerState]] = deque(maxlen=KEPT_CHANGES)
        self._config, self._clock = config, clock
        self._epoch = 0  # changes with the state: attempts begun before say nothing about what is true now
        self._in_a_row = 0
        self._recent: deque[tuple[float, bool]] = deque()  # time, failed
        self._recent_failures = 0
        self._openings = 0  # since a request last succeeded
        self._probe_at = 0.0

    @property
    def admits(self) -> bool:
        """Whether `acquire` would give a permit."""
        return self.state in (BreakerState.CLOSED, BreakerState.HALF_OPEN)

    @property
    def failures_left(self) -> int:
        """How many more failures in a row it takes to open it."""
        return self._config.in_a_row - self._in_a_row

    @property
    def probe_in(self) -> float:
        """Seconds until it is worth looking whether `probe` gives a permit."""
        if self.state is BreakerState.PROBING:
            return self._config.first
        return max(0.0, self._probe_at - self._clock())

    def acquire(self) -> Permit | None:
        """Leave for a request's attempt; None while the endpoint is left alone."""
        if not self.admits:
            return None
        if self.state is BreakerState.HALF_OPEN:
            self._change(BreakerState.PROBING)
        return Permit(self._epoch)

    def probe(self) -> Permit | None:
        """Leave for a probe; None unless the endpoint is left alone and its time is up."""
        if self.state not in (BreakerState.OPEN, BreakerState.HALF_OPEN) or self._clock() < self._probe_at:
            return None
        self._change(BreakerState.PROBING)
        return Permit(self._epoch, is_probe=True)

    def succeeded(self, permit: Permit) -> None:
        if permit.epoch != self._epoch:
            return
        if self.state is BreakerState.PROBING:
            self._change(BreakerState.CLOSED)
        if permit.is_probe:
            self._in_a_row = self._config.in_a_row - 1  # what a probe says, the next request has to confirm
            return
        self._openings = self._in_a_row = 0
        self._note(failed=False)

    def failed(self, permit: Permit) -> None:
        if permit.epoch != self._epoch:
            return
        if self.state is BreakerState.PROBING:
            self._open()
            return
        self._in_a_row += 1
        self._note(failed=True)
        config = self._config
        mostly = len(self._recent) >= config.least and self._recent_failures >= config.share * len(self._recent)
        if self._in_a_row >= config.in_a_row or mostly:
            self._open()

    def faulted(self, permit: Permit) -> None:
        """The server answered the probe with a fault: it may be the probe that it does not like."""
        if permit.epoch == self._epoch:
            self._open(BreakerState.HALF_OPEN)

    def abandoned(self, permit: Permit) -> None:
        """The attempt was cancelled before it showed anything; the next one may decide."""
        if permit.epoch == self._epoch and self.state is BreakerState.PROBING:
            self._change(BreakerState.OPEN if permit.is_probe else BreakerState.HALF_OPEN)

    def _open(self, state: BreakerState = BreakerState.OPEN) -> None:
        seconds = min(self._config.first * 2**self._openings, self._config.longest)
        self._probe_at = self._clock() + seconds
        self._openings = min(self._openings + 1, 32)  # far beyond `longest`, and no overflow
        self._change(state)

    def _change(self, state: BreakerState) -> None:
        self.state = state
        self._epoch += 1
        self._in_a_row = 0
        self._recent.clear()
        self._recent_failures = 0
        self.changes.append((self._clock(), state))

    def _note(self, failed: bool) -> None:
        now = self._clock()
        self._recent.append((now, failed))
        self._recent_failures += failed
        while self._recent[0][0] < now - self._config.window:
            self._recent_failures -= self._recent.popleft()[1]
