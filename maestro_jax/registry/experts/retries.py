"""When a failed attempt is made again: how long to wait, and whether the run can afford it. No I/O, no clock.

Waiting: exponential back-off with full jitter (M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog,
2015). Affording: retries are paid from a budget that requests and time fill, so that an outage of every endpoint
multiplies the load by 1.1, not by the number of attempts.
"""

import dataclasses
import datetime
import email.utils
import re
from collections.abc import Callable

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")  # with the fractions that some servers send


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """How one request is tried again; times in seconds.

    Attributes:
      attempts: most attempts of a request, the first included.
      first, longest: before the second attempt the wait is drawn from 0 to `first`, then from twice as much each
        time, up to `longest`.
      longest_after: an endpoint's Retry-After is obeyed up to so many seconds.
    """

    attempts: int = 3
    first: float = 0.5
    longest: float = 8.0
    longest_after: float = 30.0

    def wait(self, failures: int, retry_after: float, draw: Callable[[], float]) -> float:
        """Seconds to wait after so many failures.

        Args:
          retry_after: what the endpoint asked for; 0 if it did not.
          draw: a random number between 0 and 1.
        """
        jitter = draw() * min(self.longest, self.first * 2 ** (failures - 1))
        return max(jitter, self.obeyed(retry_after))

    def obeyed(self, retry_after: float) -> float:
        """Seconds of a Retry-After that are waited."""
        return min(retry_after, self.longest_after)


def parse_retry_after(value: str, now: datetime.datetime) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, section 10.2.3); 0 for what is neither number nor date."""
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date; one without a time zone
        return 0.0


class RetryBudget:
    """Retries that the whole run may still make: at most `share` x requests + `rate` x seconds since it was made.

    What is saved up is capped, so that hours of good replies do not pay for a storm.

    Args:
      clock: seconds, monotonic.
    """

    share = 0.10
    rate = 3.0
    most = 100.0

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._left = 0.0
        self._at = clock()

    def offer(self) -> None:
        """A request begins."""
        self._left = min(self.most, self._left + self.share)

    def take(self) -> bool:
        """Whether a retry can be afforded; if so, it is paid for."""
        now = self._clock()
        self._left = min(self.most, self._left + self.rate * (now - self._at))
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
