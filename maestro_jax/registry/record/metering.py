"""What requests to experts cost: counters of each expert, and the caps of the run.

In: an expert. Out: the same expert, counted, that refuses once a cap is reached. It stands under the cache, so that
only requests which were made are counted.
"""

import collections
import dataclasses
import math
from typing import Any

from maestro_jax.errors import UserError
from maestro_jax.registry.description.config import LimitsConfig
from maestro_jax.registry.description.interface import Expert, Reply, Request
from maestro_jax.types import Status, Usage

_STEP = math.log(1.02)  # of the histogram: latencies are known to 1 %
_LEAST_SECONDS = 1e-6


class LimitError(UserError):
    """A cap of the run is reached."""


class Latencies:
    """A histogram of seconds with logarithmic steps: quantiles to 1 %, whatever their number."""

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(math.log(max(seconds, _LEAST_SECONDS)) / _STEP)] += 1

    def quantile(self, share: float) -> float:
        """The least seconds that at least this share of latencies do not exceed; 0 if there are none."""
        counts = dict(self._counts)  # another thread may add meanwhile
        rank = max(1, math.ceil(share * sum(counts.values())))
        for step in sorted(counts):
            rank -= counts[step]
            if rank <= 0:
                return math.exp(step * _STEP)
        return 0.0


@dataclasses.dataclass
class ExpertCounter:
    """Totals of one expert's requests since the registry was built; replies from the cache are no requests."""

    calls: int = 0
    usage: Usage = Usage()
    statuses: dict[Status, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(Status, 0))
    latencies: Latencies = dataclasses.field(default_factory=Latencies)

    def add(self, reply: Reply) -> None:
        self.calls += 1
        self.usage += reply.usage
        self.statuses[reply.status] += 1
        self.latencies.add(reply.seconds)

    def to_json(self) -> dict[str, Any]:
        """Plain values; latencies in seconds."""
        return {
            "calls": self.calls,
            "success": self.statuses[Status.OK] / max(1, self.calls),
            "statuses": {status.name: count for status, count in self.statuses.items() if count},
            **{f"p{percent}_seconds": self.latencies.quantile(percent / 100) for percent in (50, 95, 99)},
            **dataclasses.asdict(self.usage),
        }


class Spending:
    """What the run has spent, and whether it may go on.

    A cap is checked before a request; those that are under way then still add to it.

    Args:
      calls, usage: before, by all processes; a run that goes on has spent what it had.
      processes: that go on. Nobody counts for all: each takes it that the others spend what it does.

    Attributes:
      calls, usage: so far; of those that go on, this process's only.
    """

    def __init__(self, limits: LimitsConfig, calls: int = 0, usage: Usage | None = None, processes: int = 1):
        self.calls = calls
        self.usage = usage or Usage()
        self._before, self._processes = self._spent(), processes
        self._limits = limits
        self._refused = ""  # the cap for which a request was refused

    def begin(self) -> bool:
        """Whether one more request may go out; if so, it is counted."""
        if reached := self._reached():
            self._refused = reached
            return False
        self.calls += 1
        return True

    def add(self, usage: Usage) -> None:
        self.usage += usage

    def check(self) -> None:
        """Raises LimitError once a request has been refused."""
        if self._refused:
            raise LimitError(
                f"the run has reached its cap {self._refused}; nothing was scored without the expert: "
                f"raise {self._refused.split('=')[0]} (0 is no limit) and start the same command again to go on"
            )

    def _reached(self) -> str:
        """The cap that is reached, as it stands in the config; empty if none is."""
        for name, value in self._spent().items():
            cap, before = getattr(self._limits, name), self._before[name]
            if cap and before + (value - before) * self._processes >= cap:
                return f"config.registry.limits.{name}={cap}"
        return ""

    def _spent(self) -> dict[str, float]:
        """By the name of the cap."""
        tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        return {"calls": self.calls, "tokens": tokens, "price": self.usage.price}


class MeteredExpert:
    """An expert whose requests are counted."""

    def __init__(self, expert: Expert, spending: Spending):
        self.name = expert.name
        self.counter = ExpertCounter()
        self._expert, self._spending = expert, spending

    async def ask(self, request: Request) -> Reply:
        if not self._spending.begin():
            return Reply("", Status.UNAVAILABLE)
        reply = await self._expert.ask(request)
        self._spending.add(reply.usage)
        self.counter.add(reply)
        return reply

    async def close(self) -> None:
        await self._expert.close()
