"""Everything that experts answered, appended to a file as it comes; and a run served from such a file.

Lines are JSON objects of four kinds:

    section   a part of the run begins ("warm start", "step 7"). A section that begins again, since the run was
              interrupted in it, replaces its first attempt and all sections that followed that; one that is made again
              "alone" (a figure with gaps) replaces its first attempt only.
    call      what came back to the policy for one call: who asked, a hash of what, the observation.
    request   what one expert or service answered while a call ran: its version, a hash of the request, the reply.
              Replies from the cache are none: nobody was asked. All were paid for, in replaced sections, too.
    void      the last call of each of these askers does not count: it failed, or followed a failure, and is made again.

A run is served from its calls (`replay.py`), each section from its own. They hold all that the policy ever saw:
whatever a clock decided (a deadline, which of two equal requests came first) is in the observation already, and no
skill need be run again.

A line is one write to the file, so it outlives the process at once, and the line of a call is written before its
observation goes to the engine; it is on disk (fsync) before a checkpoint is. A last line without its end was torn by a
kill; its call was not trained on.

Beside it, journal.spent.json holds what all requests up to some byte of it have cost, as of the last sync: a run that
goes on reads what lies behind. It is believed only if it fits the journal; else all is read.
"""

import contextlib
import contextvars
import dataclasses
import errno
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from maestro_jax.errors import ConfigError, DataError, UserError
from maestro_jax.observe.files import disk_cure, read_json, write_json
from maestro_jax.registry.description.interface import Expert, Reply, Request, Service, ServiceResult
from maestro_jax.registry.description.keys import content_key, image_digest, request_key
from maestro_jax.registry.record.cache import open_for_append
from maestro_jax.strict_json import decode_line, encode
from maestro_jax.types import Call, Observation, Status, Usage

logger = logging.getLogger(__name__)

_SEALED_BYTES = 4096  # of a journal, before the byte up to which its totals count

# Who asks, while a call runs: a trajectory and its turn, whatever the order of arrival. Set by the dispatcher.
ASKER: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="")


class JournalError(UserError):
    """The journal cannot be written."""


# ---- lines -------------------------------------------------------------------------------------------------


class _Line(msgspec.Struct, tag_field="kind", omit_defaults=True):
    """A line of the file; the module's docstring says what each kind stands for."""


class SectionLine(_Line, tag="section"):
    name: str
    alone: bool = False


class VoidLine(_Line, tag="void"):
    askers: list[str]


class _Answered(_Line):
    """What was answered; `request` is a hash, `status` the name of a `Status`."""

    asker: str
    request: str
    text: str
    status: str
    seconds: float
    usage: Usage

    def __post_init__(self) -> None:
        if self.status not in Status.__members__:
            raise ValueError(f"{self.status} is no status")


class CallLine(_Answered, tag="call"):
    expert: str
    skill: str
    query: str

    @property
    def observation(self) -> Observation:
        return Observation(self.text, Status[self.status], self.seconds, self.usage)


class RequestLine(_Answered, tag="request"):
    """`images` are the hashes of those that a service of this process made; it costs nothing."""

    name: str
    version: str
    at: float
    images: list[str] | None = None


Line = SectionLine | CallLine | RequestLine | VoidLine
_LINES = msgspec.json.Decoder(Line)


# ---- writing -----------------------------------------------------------------------------------------------


class Journal:
    """Appends to the journal of a run; see the module's docstring. Used from several threads.

    A journal that cannot be written ends the run: it could not be replayed, and what was paid for would be lost. After
    the first error nothing is written any more, since what follows would be glued to the line that was torn.

    Raises:
      JournalError: of every method, when the file cannot be written, or could not be before.
      UserError: of `sync` and `close`, when the totals beside it cannot be written.

    Attributes:
      path: of the file.
      section: that has begun last.
    """

    def __init__(self, path: str):
        self.path = path
        self.section = ""
        self._lock = threading.Lock()  # of what writes; held for no longer than one write takes
        self._syncing = threading.Lock()  # taken before the other one
        self._error: JournalError | None = None
        self._kept = Totals()  # what was written last of them
        try:
            self._file = open_for_append(path)
            size = self.size()  # 0 of what is no file
            self._totals = dataclasses.replace(read_totals(path), size=size) if size else Totals()
        except OSError as error:
            raise self._broken(error) from error

    def begin(self, section: str, alone: bool = False) -> None:
        """Begins a part of the run.

        Args:
          alone: it is made again after others that stay: it replaces its first attempt only.
        """
        self.section = section
        self._write(SectionLine(name=section, alone=alone))

    def call(self, asker: str, call: Call, question: str, images: tuple[bytes, ...], observation: Observation) -> None:
        key, seen = call_key(call, question, images), observation
        answered = asker, key, seen.text, seen.status.name, seen.seconds, seen.usage
        self._write(CallLine(*answered, call.expert, call.skill, call.query))

    def void(self, askers: Sequence[str]) -> None:
        self._write(VoidLine(askers=list(askers)))

    def request(self, name: str, version: str, key: str, reply: Reply | ServiceResult) -> None:
        """Records what an expert, or a service of this process, answered; `key` is the hash of what it was asked."""
        answered = ASKER.get(), key, reply.text, reply.status.name, reply.seconds, reply.usage
        images = [*map(image_digest, reply.images)] if isinstance(reply, ServiceResult) else None
        self._write(RequestLine(*answered, name, version, time.time(), images))

    def spent(self) -> tuple[int, Usage]:
        """How often experts have been asked, and what that cost, as far as the journals of all processes tell.

        Nobody knows what requests cost that were under way when a process was killed.

        Raises:
          ConfigError: the journal of another process cannot be read.
        """
        calls, usage = 0, Usage()
        for path in journals(self.path):
            try:
                totals = self._totals if path == Path(self.path) else read_totals(str(path))
            except OSError as error:
                raise ConfigError(f"{error.filename} cannot be read ({error.strerror}); make it readable") from error
            calls += totals.calls
            usage += totals.usage
        return calls, usage

    def size(self) -> int:
        """Bytes written so far, by this process and those before it."""
        return os.fstat(self._file).st_size

    def sync(self) -> None:
        """Returns when everything written so far is on disk. Others may write meanwhile.

        One at a time: the kernel tells of a page that it lost only once, and whoever waits has to hear of it.
        """
        with self._syncing:
            with self._lock:
                self._check()
                totals = self._totals
                is_all = totals.size == self.size()  # else somebody else writes to it, too
            try:
                os.fsync(self._file)
            except OSError as error:
                with self._lock:
                    raise self._broken(error) from error
            if is_all and totals != self._kept:
                values = dataclasses.asdict(totals)
                write_json(_kept_path(self.path), values | {"seal": _seal(self._file, values)})
                self._kept = totals

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _write(self, line: Line) -> None:
        data = encode(line) + b"\n"
        with self._lock:
            self._check()
            try:
                if os.write(self._file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise self._broken(error) from error
            self._totals = self._totals.with_line(line, len(data))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _broken(self, error: OSError) -> JournalError:
        cure = f"{disk_cure(error.errno)}, and start the run again"
        self._error = JournalError(f"the journal {self.path} cannot be written ({error.strerror}); {cure}")
        return self._error


class JournaledExpert:
    """An expert whose replies are recorded.

    Args:
      identity: what its replies depend on besides the request.
    """

    def __init__(self, expert: Expert, identity: str, journal: Journal):
        self.name = expert.name
        self._expert, self._identity, self._journal = expert, identity, journal
        self._version = _short(identity)

    async def ask(self, request: Request) -> Reply:
        reply = await self._expert.ask(request)
        self._journal.request(self.name, self._version, request_key(self._identity, request), reply)
        return reply

    async def close(self) -> None:
        await self._expert.close()


class JournaledService:
    """A service whose results are recorded; of images, their hashes."""

    def __init__(self, service: Service, identity: str, journal: Journal):
        self.name = service.name
        self._service, self._identity, self._journal = service, identity, journal
        self._version = _short(identity)

    async def run(self, images: tuple[bytes, ...], text: str, deadline: float) -> ServiceResult:
        made = await self._service.run(images, text, deadline)
        key = content_key(["run", self._identity, text, *map(image_digest, images)])
        self._journal.request(self.name, self._version, key, made)
        return made

    async def close(self) -> None:
        await self._service.close()


# ---- what was spent ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Totals:
    """What the requests in the first `size` bytes of a journal have cost."""

    size: int = 0
    calls: int = 0
    usage: Usage = Usage()

    def with_line(self, line: Line, size: int) -> "Totals":
        if not isinstance(line, RequestLine) or line.images is not None:
            return dataclasses.replace(self, size=self.size + size)
        return Totals(self.size + size, self.calls + 1, self.usage + line.usage)


def read_totals(path: str) -> Totals:
    """Of a whole journal. What is kept beside it need not be read.

    Raises:
      OSError: the file cannot be read.
    """
    totals = kept_totals(path)
    for line in read_lines(path, totals.size):
        totals = totals.with_line(line, 0)
    return totals


def kept_totals(path: str) -> Totals:
    """As they were kept by `Journal.sync`; of nothing, unless they are whole and of this journal."""
    with contextlib.suppress(DataError, AttributeError, KeyError, TypeError), open(path, "rb") as file:
        values = read_json(_kept_path(path)) or {}
        if values.pop("seal") == _seal(file.fileno(), values):
            return Totals(values["size"], values["calls"], Usage(**values["usage"]))
    return Totals()


def _kept_path(path: str) -> Path:
    return Path(path).with_suffix(".spent.json")


def _seal(file: int, values: Mapping[str, Any]) -> str:
    """Of the totals and of the bytes that they end with: another journal, or a shorter one, has other ones."""
    size, end = values["size"], b""
    if 0 <= size <= os.fstat(file).st_size:
        start = max(0, size - _SEALED_BYTES)
        end = os.pread(file, size - start, start)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + end).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------


def journals(path: str) -> list[Path]:
    """Of all processes that the run has had, by that of one of them (`cluster.own_path`)."""
    return sorted(Path(path).parent.glob("journal*.jsonl"))


def read_lines(path: str, start: int = 0) -> Iterator[Line]:
    """The whole lines from byte `start` on. One that is damaged is named: whoever needs it will miss it.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(start)
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return
            try:
                yield decode_line(text, _LINES)
            except ValueError:
                behind = f" behind byte {start}" if start else ""
                logger.warning("%s line %d%s is damaged and left out", path, number, behind)


# ---- keys --------------------------------------------------------------------------------------------------


def call_key(call: Call, question: str, images: tuple[bytes, ...]) -> str:
    """The hash of all that a call asks."""
    return content_key(["call", call.expert, call.skill, call.query, question, *map(image_digest, images)])


def _short(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
