"""Coroutines that are run to their end by code that is none, also where a notebook's event loop runs already."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(work: Coroutine[Any, Any, T], run: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run) -> T:
    """The result of a coroutine; `run` does it in this thread, or in one of its own where this one has a loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run, work).result()
