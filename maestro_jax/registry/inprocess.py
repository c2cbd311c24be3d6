"""Experts and services that live in this process: plain synchronous classes behind the async interface.

In: a config entry whose `implementation` is a class with `answer(messages) -> str` (expert) or
`run(images, text) -> (text, images)` (service). Out: an `Expert` or a `Service` that keeps deadlines
and never raises. Each instance has one thread of its own: the class need not be thread-safe, and one
that hangs stops neither the others nor the end of the process.
"""

import asyncio
import hashlib
import json
import logging
import math
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.registry.cache import request_key
from maestro_jax.registry.config import ExpertConfig, ServiceConfig, load_implementation
from maestro_jax.registry.interface import Reply, Request, ServiceResult
from maestro_jax.types import Status, Usage

logger = logging.getLogger(__name__)

TOKENS_PER_PRICE = 1_000_000  # prices are per million tokens


class SpecialistError(Exception):
    """A specialist raised or returned the wrong type; the cause is chained."""


class Worker:
    """One daemon thread that runs functions in the order they are submitted."""

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        # Not a ThreadPoolExecutor: the interpreter waits for its threads at exit, also for one that hangs.
        threading.Thread(target=self._loop, name=f"specialist {name}", daemon=True).start()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Awaits `function` in the thread; cancelled before its turn, it is not run at all."""
        future: Future[Any] = Future()
        self._jobs.put((future, function))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._jobs.put(None)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:  # SystemExit or StopIteration would break the event loop
                wrapped = SpecialistError(f"{type(error).__name__} in a specialist")
                wrapped.__cause__ = error
                future.set_exception(wrapped)


class InProcessExpert:
    """An expert whose model is a Python object of this process (see `registry.interface.Expert`)."""

    def __init__(self, config: ExpertConfig):
        self.name = config.name
        self.identity = implementation_identity(config)
        self._config = config
        self._specialist = _build(config, "expert")
        self._worker = Worker(config.name)

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
        self._worker.close()

    async def _answer(self, request: Request) -> str:
        if self._config.latency_mean > 0:
            await asyncio.sleep(self._latency(request))
        text = await self._worker.call(lambda: self._specialist.answer(request.messages))
        if not isinstance(text, str):
            raise SpecialistError(f"answer returned {type(text).__name__}, not str")
        return text

    def _latency(self, request: Request) -> float:
        """Seconds, exponentially distributed; a function of seed and request, whatever the order of calls."""
        digest = hashlib.sha256(f"{self._config.latency_seed} {request_key(self.identity, request)}".encode()).digest()
        uniform = int.from_bytes(digest[:8], "big") / 2**64
        return -self._config.latency_mean * math.log1p(-uniform)

    def _usage(self, request: Request, text: str) -> Usage:
        """A specialist has no tokenizer: words stand for tokens. A request that gave nothing still was read."""
        prompt = sum(len(message.text.split()) for message in request.messages)
        completion = len(text.split())
        price = prompt * self._config.price_prompt + completion * self._config.price_completion
        return Usage(prompt, completion, price / TOKENS_PER_PRICE)


class InProcessService:
    """A service that is a Python object of this process (see `registry.interface.Service`)."""

    def __init__(self, config: ServiceConfig):
        self.name = config.name
        self.identity = implementation_identity(config)
        self._config = config
        self._service = _build(config, "service")
        self._worker = Worker(config.name)

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult:
        start = time.monotonic()
        try:
            async with asyncio.timeout(min(deadline, self._config.timeout)):
                made, pictures = await self._worker.call(lambda: _checked(self._service.run(images, text)))
            return ServiceResult(made, pictures, Status.OK, time.monotonic() - start)
        except TimeoutError:
            status = Status.TIMEOUT
        except SpecialistError:
            logger.exception('service "%s" failed', self.name)
            status = Status.UNAVAILABLE
        return ServiceResult(status=status, seconds=time.monotonic() - start)

    async def close(self) -> None:
        self._worker.close()


def _checked(found: Any) -> tuple[str, tuple[bytes, ...]]:
    text, images = found
    if not isinstance(text, str) or not all(isinstance(image, bytes) for image in images):
        raise TypeError("a service must return (str, tuple of bytes)")
    return text, tuple(images)


def _build(config: ExpertConfig | ServiceConfig, what: str) -> Any:
    where = f'{what} "{config.name}"'
    cls = load_implementation(config.implementation, where)
    try:
        return cls(**config.options)
    except Exception as error:  # foreign constructor: anything may be raised
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        cure = "correct its options in the registry config"
        raise ConfigError(f"{where} cannot be built from {config.implementation} ({reason}); {cure}") from error


def implementation_identity(config: ExpertConfig | ServiceConfig) -> str:
    """What a kept reply depends on besides the request: class, options, and the sources beside the class.

    All modules of its folder count, so that a reply cache on disk does not outlive a change of the
    specialist or of what it shares with its neighbours.
    """
    cls = load_implementation(config.implementation, config.name)
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    digest = hashlib.sha256()
    for source in sorted(pathlib.Path(file).parent.glob("*.py")) if file else ():
        digest.update(source.read_bytes())
    options = json.dumps(dict(config.options), sort_keys=True, default=repr)
    return f"{config.implementation} {options} {digest.hexdigest()}"
