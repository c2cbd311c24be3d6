"""A load of calls: so many at a time until all are made, and how long each took."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

QUESTION = "What does the figure show? " * 20  # every call's; what they differ in comes behind it


async def drive(ask: Callable[[str], Awaitable[str]], calls: int, in_flight: int) -> dict[str, float]:
    """Makes the calls.

    Args:
      ask: takes a question that no other call has, gives the reply's text.

    Returns:
      Seconds of all, and the median and the 99th percentile of seconds of one.
    """
    numbers = iter(range(calls))
    latencies: list[float] = []

    async def work() -> None:
        for number in numbers:
            start = time.perf_counter()
            text = await ask(f"{QUESTION}{number}")
            latencies.append(time.perf_counter() - start)
            if not text.startswith("the figure shows"):
                raise ValueError(f"call {number} got {text!r:.80}")

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    seconds = time.perf_counter() - start
    latencies.sort()
    p50, p99 = (latencies[math.ceil(share * calls) - 1] for share in (0.5, 0.99))
    return {"seconds": seconds, "p50": p50, "p99": p99}
