"""Replies of deterministic experts and services, kept by what was asked.

In: a key made of everything that determines a reply, and a way to get it. Out: the reply, from memory,
from a request already in flight (the members of a group often ask the same thing), or from the callee.
Only successful replies are kept. With a file, they are appended to it as JSON lines and survive a
restart. All methods run on one event loop; nothing here is locked.

A kept reply carries the usage and the seconds of the request that earned it, so a member's cost does
not depend on which member of the group happened to ask first.
"""

import asyncio
import base64
import binascii
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, cast

from maestro_jax.registry.interface import Expert, Reply, Request, Sampling, Service, ServiceResult
from maestro_jax.types import Status, Usage

logger = logging.getLogger(__name__)

R = TypeVar("R", Reply, ServiceResult)


def content_key(parts: Iterable[str | bytes]) -> str:
    """sha256 over parts, each with its type and length, so that no two lists of parts collide by joining."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{'t' if isinstance(part, str) else 'b'}{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def request_key(identity: str, request: Request) -> str:
    """The key of an expert's reply: who is asked, how it decodes, what it is shown. Not the deadline."""
    # An expert's own settings are part of its identity.
    sampling = request.sampling or Sampling()
    settings = (sampling.temperature, sampling.max_tokens, sampling.top_p)
    parts: list[str | bytes] = ["ask", identity, repr(settings)]
    for message in request.messages:
        parts += [message.role, message.text, str(len(message.images)), *message.images]
    return content_key(parts)


class ReplyCache:
    """Replies by key; see the module's docstring.

    Args:
      path: the JSON-lines file; None keeps everything in memory only.
    """

    def __init__(self, path: str | None = None):
        self.hits = 0
        self._kept: dict[str, Reply | ServiceResult] = {}
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._file: int | None = None
        if path is not None:
            self._kept = _load(path)
            self._file = open_for_append(path)

    def __len__(self) -> int:
        return len(self._kept)

    async def fetch(self, key: str, ask: Callable[[float], Coroutine[Any, Any, R]], deadline: float, timed_out: R) -> R:
        """The reply kept under `key`, else the one of the request in flight, else `ask(seconds left)`.

        A caller never waits past its own deadline (it then gets `timed_out`), and one whose deadline is
        later than that of the request it joined asks again when that one times out.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline
        while True:
            if key in self._kept:
                self.hits += 1
                return cast(R, self._kept[key])
            joined = self._running.get(key)
            task = joined or self._start(key, ask(end - loop.time()))
            try:
                async with asyncio.timeout_at(end):
                    # Shielded: a caller that gives up must not cancel the others' request.
                    reply = cast(R, await asyncio.shield(task))
            except TimeoutError:
                return timed_out
            if joined is None or reply.status is not Status.TIMEOUT:
                self.hits += joined is not None
                return reply

    def _start(self, key: str, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        async def run() -> R:
            try:
                reply = await work
                if reply.status is Status.OK:
                    self._keep(key, reply)
                return reply
            finally:
                del self._running[key]

        task = self._running[key] = asyncio.create_task(run())
        return task

    def _keep(self, key: str, reply: Reply | ServiceResult) -> None:
        self._kept[key] = reply
        if self._file is None:
            return
        try:
            # One write call a line: lines of several processes do not mix.
            os.write(self._file, _to_line(key, reply))
        except OSError as error:
            logger.warning("reply cache: cannot write (%s); going on in memory only", error)
            self._close_file()

    async def close(self) -> None:
        """Cancels what is in flight and closes the file."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class CachedExpert:
    """A deterministic expert behind the cache. What is asked at another temperature than 0 passes by it.

    Attributes:
      hits: requests that another one's reply was for.
    """

    def __init__(self, expert: Expert, identity: str, cache: ReplyCache):
        self.name = expert.name
        self.hits = 0
        self._expert, self._identity, self._cache = expert, identity, cache

    async def ask(self, request: Request) -> Reply:
        if request.sampling is not None and request.sampling.temperature > 0:
            return await self._expert.ask(request)
        self.hits += 1

        def ask(seconds: float) -> Coroutine[Any, Any, Reply]:
            self.hits -= 1
            return self._expert.ask(dataclasses.replace(request, deadline=seconds))

        key = request_key(self._identity, request)
        return await self._cache.fetch(key, ask, request.deadline, Reply("", Status.TIMEOUT, seconds=request.deadline))

    async def close(self) -> None:
        await self._expert.close()


class CachedService:
    """A deterministic service behind the cache."""

    def __init__(self, service: Service, identity: str, cache: ReplyCache):
        self.name = service.name
        self._service, self._identity, self._cache = service, identity, cache

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult:
        def run(seconds: float) -> Coroutine[Any, Any, ServiceResult]:
            return self._service.run(images, text, seconds)

        key = content_key(["run", self._identity, text, *images])
        late = ServiceResult(status=Status.TIMEOUT, seconds=deadline)
        return await self._cache.fetch(key, run, deadline, late)

    async def close(self) -> None:
        await self._service.close()


# ---- the file ----------------------------------------------------------------------------------------------


def _to_line(key: str, reply: Reply | ServiceResult) -> bytes:
    record: dict[str, Any] = {"key": key, "text": reply.text, "seconds": reply.seconds}
    if isinstance(reply, Reply):
        record["usage"] = dataclasses.asdict(reply.usage)
    else:
        record["images"] = [base64.b64encode(image).decode("ascii") for image in reply.images]
    return json.dumps(record).encode("ascii") + b"\n"


def _from_line(line: bytes) -> tuple[str, Reply | ServiceResult]:
    """Raises ValueError, KeyError or TypeError for a damaged line."""
    record = json.loads(line)
    key, text, seconds = record["key"], record["text"], float(record["seconds"])
    if not isinstance(key, str) or not isinstance(text, str):
        raise ValueError("key and text must be texts")
    if "images" in record:
        images = tuple(base64.b64decode(image, validate=True) for image in record["images"])
        return key, ServiceResult(text, images, Status.OK, seconds)
    usage = record["usage"]
    tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return key, Reply(text, Status.OK, Usage(*tokens, float(usage["price"])), seconds)


def _load(path: str) -> dict[str, Reply | ServiceResult]:
    """Reads what is whole. A last line without its end was torn by a kill and is dropped in silence."""
    kept: dict[str, Reply | ServiceResult] = {}
    if not os.path.exists(path):
        return kept
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    damaged = 0
    for line in filter(None, lines):
        try:
            key, reply = _from_line(line)
            kept[key] = reply
        except (ValueError, KeyError, TypeError, binascii.Error):
            damaged += 1
    if damaged:
        logger.warning("reply cache %s: skipped %d damaged of %d lines", path, damaged, len(lines))
    return kept


def open_for_append(path: str) -> int:
    """A descriptor of a file of lines, at the start of a new line."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")  # a torn last line must not swallow the next one
    return descriptor
