"""Experts and services that live in this process or in processes of their own, behind the async interface.

In: a config entry whose `implementation` is a class with `answer(messages) -> str` (expert) or
`run(images, text) -> (text, images)` (service). Out: an `Expert` or a `Service` that keeps deadlines and never
raises. Each of its workers has an instance of its own: the class need not be thread-safe, and no reply depends on who
gave it unless the class remembers.
"""

import asyncio
import hashlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig, ServiceConfig
from maestro_jax.registry.description.interface import Reply, Request, ServiceResult
from maestro_jax.registry.description.keys import request_key
from maestro_jax.registry.experts import implementations
from maestro_jax.registry.experts.implementations import SpecialistError, implementation_identity
from maestro_jax.registry.experts.processes import HostedSpecialist
from maestro_jax.types import Status, Usage

logger = logging.getLogger(__name__)
T = TypeVar("T")

END_SECONDS = 5.0  # for a worker whose process was killed


class InProcessExpert:
    """An expert whose model is an instance of a class (see `registry.description.interface.Expert`)."""

    def __init__(self, config: ExpertConfig):
        self.name = config.name
        self.identity = implementation_identity(config)
        self._config = config
        self._workers = make_workers(config, "expert")

    async def ask(self, request: Request) -> Reply:
        start = time.monotonic()
        text, status = "", Status.OK
        try:
            async with asyncio.timeout(min(request.deadline, self._config.timeout)):
                text = await self._answer(request)
        except TimeoutError:
            status = Status.TIMEOUT
        except SpecialistError:
            logger.exception('expert "%s" failed', self.name)
            status = Status.UNAVAILABLE
        return Reply(text, status, self._usage(request, text), time.monotonic() - start)

    async def close(self) -> None:
        await self._workers.close()

    async def _answer(self, request: Request) -> str:
        if self._config.latency_mean > 0:
            await asyncio.sleep(self._latency(request))
        return await self._workers.call(lambda one: implementations.answer(one, request.messages))

    def _latency(self, request: Request) -> float:
        """Seconds, exponentially distributed; a function of seed and request, whatever the order of calls."""
        digest = hashlib.sha256(f"{self._config.latency_seed} {request_key(self.identity, request)}".encode()).digest()
        uniform = int.from_bytes(digest[:8], "big") / 2**64
        return -self._config.latency_mean * math.log1p(-uniform)

    def _usage(self, request: Request, text: str) -> Usage:
        """A specialist has no tokenizer: words stand for tokens. A request that gave nothing still was read."""
        prompt = sum(len(message.text.split()) for message in request.messages)
        completion = len(text.split())
        return self._config.priced(prompt, completion)


class InProcessService:
    """A service that is an instance of a class (see `registry.description.interface.Service`)."""

    def __init__(self, config: ServiceConfig):
        self.name = config.name
        self.identity = implementation_identity(config)
        self._config = config
        self._workers = make_workers(config, "service")

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult:
        start = time.monotonic()
        try:
            async with asyncio.timeout(min(deadline, self._config.timeout)):
                made, pictures = await self._workers.call(lambda one: implementations.run(one, images, text))
            return ServiceResult(made, pictures, Status.OK, time.monotonic() - start)
        except TimeoutError:
            status = Status.TIMEOUT
        except SpecialistError:
            logger.exception('service "%s" failed', self.name)
            status = Status.UNAVAILABLE
        return ServiceResult(status=status, seconds=time.monotonic() - start)

    async def close(self) -> None:
        await self._workers.close()


# ---- workers -----------------------------------------------------------------------------------------------


class Job(Generic[T]):
    """One piece of work for whichever worker is free. Given up while it runs, it ends a worker's process."""

    def __init__(self, work: Callable[[Any], T]):
        self.future: Future[T] = Future()
        self._work = work
        self._lock = threading.Lock()  # `give_up` must not hit what the worker does next
        self._given_up = False
        self._specialist: Any = None  # while it runs

    def run(self, specialist: Any) -> None:
        with self._lock:
            if self._given_up or not self.future.set_running_or_notify_cancel():
                return
            self._specialist = specialist
        try:
            result = self._work(specialist)
        except BaseException as error:  # SystemExit or StopIteration would break the event loop
            self._done()
            wrapped = SpecialistError(f"{type(error).__name__} in a specialist")
            wrapped.__cause__ = error
            self.future.set_exception(wrapped)
        else:
            self._done()
            self.future.set_result(result)

    def give_up(self) -> None:
        """Nobody waits for the result any more. A thread cannot be ended, a process can."""
        with self._lock:
            self._given_up = True
            if isinstance(self._specialist, HostedSpecialist):
                self._specialist.kill()

    def _done(self) -> None:
        with self._lock:
            self._specialist = None


class Workers:
    """Daemon threads that run jobs in the order they are submitted, each with a specialist of its own."""

    def __init__(self, name: str, *specialists: Any):
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._specialists = specialists
        # Not a ThreadPoolExecutor: the interpreter waits for its threads at exit, also for one that hangs.
        self._threads = [
            threading.Thread(target=self._loop, args=(specialist,), name=f"specialist {name}", daemon=True)
            for specialist in specialists
        ]
        for thread in self._threads:
            thread.start()

    async def call(self, work: Callable[[Any], T]) -> T:
        """Awaits `work(specialist)` in a thread; cancelled before its turn, it is not run at all."""
        job = Job(work)
        self._jobs.put(job)
        try:
            return await asyncio.wrap_future(job.future)
        finally:
            job.give_up()

    async def close(self) -> None:
        """Ends idle threads and all processes; a thread that hangs is left behind."""
        for _ in self._threads:
            self._jobs.put(None)
        hosted = [specialist for specialist in self._specialists if isinstance(specialist, HostedSpecialist)]
        for specialist in hosted:
            specialist.close()
        for thread in self._threads if hosted else ():
            await asyncio.to_thread(thread.join, END_SECONDS)

    def _loop(self, specialist: Any) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(specialist, HostedSpecialist):
                try:  # outside of the job: what takes longer than its deadline is ready for the next
                    specialist.restart_if_ended()
                except (SpecialistError, ConfigError):  # the job will fail
                    logger.exception("the process of a specialist could not be started again")
            job.run(specialist)
        if isinstance(specialist, HostedSpecialist):
            specialist.end()


def make_workers(config: ExpertConfig | ServiceConfig, what: str) -> Workers:
    """The workers of an entry.

    Args:
      what: "expert" or "service".

    Raises:
      ConfigError: an instance cannot be built.
    """
    where, entry = f'{what} "{config.name}"', (config.implementation, config.options)
    if not config.processes:
        return Workers(config.name, *(implementations.build(where, *entry) for _ in range(config.workers)))
    hosted = [HostedSpecialist(where, *entry) for _ in range(config.workers)]  # all of them build at the same time
    try:
        for specialist in hosted:
            specialist.ready()
    except (SpecialistError, ConfigError) as error:
        for specialist in hosted:
            specialist.end()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error} before {config.implementation} was built; see what it printed") from error
    return Workers(config.name, *hosted)
