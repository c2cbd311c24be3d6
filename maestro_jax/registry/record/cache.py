"""Replies of deterministic experts and services, kept by what was asked.

In: a key made of everything that determines a reply, and a way to get it. Out: the reply, from memory,
from a request already in flight (the members of a group often ask the same thing), or from the callee.
Only successful replies are kept, in bounded memory. With a file, they are appended to it as JSON lines and survive a
restart. All methods run on one event loop; nothing here is locked.

A kept reply carries the usage and the seconds of the request that earned it, so a member's cost does
not depend on which member of the group happened to ask first.
"""

import asyncio
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

import msgspec
from cachetools import LRUCache

from maestro_jax.registry.description.interface import Expert, Reply, Request, Service, ServiceResult
from maestro_jax.registry.description.keys import content_key, image_digest, request_key
from maestro_jax.strict_json import decode_line, encode
from maestro_jax.types import Status, Usage

logger = logging.getLogger(__name__)

R = TypeVar("R", Reply, ServiceResult)

MOST_BYTES = 2**28  # of memory for replies: 230,000 of 500 characters
MOST_FILE_BYTES = 2**30  # of what memory holds, base64 and all, thrice
_ENTRY_BYTES = 600  # of a reply and its key, without text and images (tracemalloc, CPython 3.11: 516)


class Kept(LRUCache[str, Reply | ServiceResult]):
    """Replies that were put or got last, as many as fit into so many bytes; one that does not fit alone is not kept."""

    def __init__(self, most_bytes: int):
        super().__init__(most_bytes, getsizeof=_reply_size)

    def put(self, key: str, reply: Reply | ServiceResult) -> None:
        if _reply_size(reply) <= self.maxsize:
            self[key] = reply


def _reply_size(reply: Reply | ServiceResult) -> int:
    images = reply.images if isinstance(reply, ServiceResult) else ()
    return _ENTRY_BYTES + sys.getsizeof(reply.text) + sum(map(len, images))


class ReplyCache:
    """Replies by key; see the module's docstring.

    Args:
      path: the JSON-lines file; None keeps everything in memory only.
      most_bytes: of memory for replies. Beyond it, those that were not asked for longest are forgotten, and asked for
        again when they are wanted. Of the file, the latest that fit are read.
      most_file_bytes: nothing is written beyond. A start leaves in a file of more than half of it what memory holds.
    """

    def __init__(self, path: str | None = None, most_bytes: int = MOST_BYTES, most_file_bytes: int = MOST_FILE_BYTES):
        self._kept = Kept(most_bytes)
        self._running: dict[str, asyncio.Future[Any]] = {}
        self._file: int | None = None
        if path is not None:
            if _load(path, self._kept) > most_file_bytes // 2:
                _rewrite(path, self._kept)
            self._file = open_for_append(path)
            self._room = most_file_bytes - os.fstat(self._file).st_size

    def __len__(self) -> int:
        return len(self._kept)

    async def fetch(self, key: str, ask: Callable[[float], Coroutine[Any, Any, R]], deadline: float, timed_out: R) -> R:
        """The reply kept under `key`, else the one of the request in flight, else `ask(seconds left)`.

        A caller never waits for another's request past its own deadline (it then gets `timed_out`), and asks again
        itself where that one came to nothing: it timed out before the caller has to, or was cancelled. `ask` keeps the
        seconds it is given.
        """
        end = time.monotonic() + deadline
        while True:
            kept = self._kept.get(key)
            if kept is not None:
                return cast(R, kept)
            left = end - time.monotonic()
            if left <= 0:
                return timed_out
            running = self._running.get(key)
            if running is None:
                return await self._lead(key, ask(left))
            await asyncio.wait((running,), timeout=left)
            if running.done() and (reply := running.result()) and reply.status is not Status.TIMEOUT:
                return cast(R, reply)

    async def _lead(self, key: str, work: Coroutine[Any, Any, R]) -> R:
        """Makes the request that others with this key may wait for: they hear the reply, or None if there is none."""
        self._running[key] = others = asyncio.get_running_loop().create_future()
        reply = None
        try:
            reply = await work
            if reply.status is Status.OK:
                self._keep(key, reply)
            return reply
        finally:
            del self._running[key]
            others.set_result(reply)

    def _keep(self, key: str, reply: Reply | ServiceResult) -> None:
        self._kept.put(key, reply)
        if self._file is None:
            return
        line = _to_line(key, reply)
        self._room -= len(line)
        try:
            if self._room < 0:
                raise OSError(errno.EFBIG, "it is full until the next start")
            # One write call a line: lines of several processes do not mix.
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the next line would be glued to half of one
        except OSError as error:
            logger.warning("reply cache: cannot write (%s); going on in memory only", error.strerror)
            self.close()

    def close(self) -> None:
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
            return self._expert.ask(Request(request.messages, request.sampling, seconds))

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

        key = content_key(["run", self._identity, text, *map(image_digest, images)])
        late = ServiceResult(status=Status.TIMEOUT, seconds=deadline)
        return await self._cache.fetch(key, run, deadline, late)

    async def close(self) -> None:
        await self._service.close()


# ---- the file ----------------------------------------------------------------------------------------------


class _Line(msgspec.Struct, omit_defaults=True):
    """A kept reply: an expert's has its usage, a service's the images (in base64) that it made."""

    key: str
    text: str
    seconds: float
    usage: Usage | None = None
    images: tuple[bytes, ...] | None = None

    @property
    def reply(self) -> Reply | ServiceResult:
        if self.images is not None:
            return ServiceResult(self.text, self.images, Status.OK, self.seconds)
        if self.usage is None:
            raise ValueError("the line has neither usage nor images")
        return Reply(self.text, Status.OK, self.usage, self.seconds)


_LINES = msgspec.json.Decoder(_Line)


def _to_line(key: str, reply: Reply | ServiceResult) -> bytes:
    own: dict[str, Any] = {"usage": reply.usage} if isinstance(reply, Reply) else {"images": reply.images}
    return encode(_Line(key, reply.text, reply.seconds, **own)) + b"\n"


def _load(path: str, kept: Kept) -> int:
    """Reads what is whole; gives the bytes of the file. A last line that a kill has torn is dropped in silence."""
    if not os.path.exists(path):
        return 0
    lines = damaged = 0
    with open(path, "rb") as file:
        for text in file:
            if text == b"\n" or not text.endswith(b"\n"):
                continue
            lines += 1
            try:
                line = decode_line(text, _LINES)
                kept.put(line.key, line.reply)
            except ValueError:
                damaged += 1
        size = file.tell()
    if damaged:
        logger.warning("reply cache %s: skipped %d damaged of %d lines", path, damaged, lines)
    return size


def _rewrite(path: str, kept: Kept) -> None:
    """Leaves in the file what is kept, or all if that cannot be written."""
    try:
        with open(f"{path}.new", "wb") as file:
            file.writelines(_to_line(key, reply) for key, reply in kept.items())
        os.replace(f"{path}.new", path)
    except OSError as error:
        logger.warning("reply cache %s cannot be made smaller (%s)", path, error.strerror)


def open_for_append(path: str) -> int:
    """A descriptor of a file of lines, at the start of a new line."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")  # a torn last line must not swallow the next one
    return descriptor
