"""The local servers of a registry's experts: started, watched, started again, stopped.

In: experts with `serve` commands. Out: lines about what happens. Each server is a process group of its own, its
output goes to a log file. All of them end with this process, unless it is killed by SIGKILL.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import ipaddress
import os
import pathlib
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from typing import IO

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.description.stages import PLACEHOLDER

LOOK_SECONDS = 0.2  # between two looks at a server
ANSWER_SECONDS = 5.0  # for saying that it is ready
NEWS_SECONDS = 10.0  # between two lines about a server that is not ready yet
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a server that died is started again; doubled each time
STEADY_SECONDS = 60.0  # a server that lived so long is not one that dies at once
STOP_SECONDS = 15.0  # from SIGTERM to SIGKILL

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Server:
    """One server of an expert.

    Attributes:
      url: its base URL; it is ready when it answers below it.
      command: what starts it, filled in; empty for one that is started elsewhere.
    """

    expert: str
    url: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        parts = urllib.parse.urlsplit(self.url)
        return f"{self.expert} {parts.hostname}:{parts.port}"

    @property
    def log_name(self) -> str:
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name) + ".log"


def servers_of(config: RegistryConfig) -> list[Server]:
    """Every endpoint of every expert, once.

    Raises:
      ConfigError: a `serve` command that cannot be meant.
    """
    found: dict[str, Server] = {}
    for expert in config.experts:
        where = f'expert "{expert.name}"'
        if expert.serve and not expert.endpoints:
            raise ConfigError(f"{where} has serve but no endpoints; say under which URL its server answers")
        if len(expert.endpoints) > 1 and expert.serve and not any("{port}" in word for word in expert.serve):
            raise ConfigError(f"{where}: serve starts a server for each endpoint; let it take {{port}}")
        for url in expert.endpoints:
            command = _filled(expert.serve, url, expert.model, where)
            known = found.setdefault(url, Server(expert.name, url, command))
            if command and known.command and known.command != command:
                raise ConfigError(f'{where} and expert "{known.expert}" serve {url} by other commands; keep one')
            if command and not known.command:
                found[url] = Server(expert.name, url, command)
    return list(found.values())


def _filled(words: Iterable[str], url: str, model: str, where: str) -> tuple[str, ...]:
    parts = urllib.parse.urlsplit(url)
    values = {"host": parts.hostname or "", "port": str(parts.port), "model": model}
    words = tuple(words)
    if words and not _is_local(values["host"]):
        raise ConfigError(f"{where}: serve starts servers on this machine, and {url} is another; remove serve")
    if words and parts.port is None:
        raise ConfigError(f"{where}: endpoint {url} has no port; add the one its server listens on")
    for word in words:
        for name in PLACEHOLDER.findall(word):
            # Braces are no mistake elsewhere: arguments may be JSON.
            if name not in values:
                raise ConfigError(f"{where}: serve has {{{name}}}; it can have {{host}}, {{port}} and {{model}}")
    return tuple(PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in words)


def command_problem(server: Server) -> str | None:
    """Why the command of a server cannot be started on this machine, with the cure; None if it can."""
    if not server.command or shutil.which(server.command[0]):
        return None
    what = f'expert "{server.expert}": serve starts {server.command[0]!r}, which is no program of this machine'
    return f"{what}; install it, put it on PATH or correct serve"


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    return False


# ---- health ------------------------------------------------------------------------------------------------


async def problem_of(server: Server) -> str | None:
    """None if the server answers, also with a refusal; else why it does not."""
    return await asyncio.to_thread(_ask, f"{server.url.rstrip('/')}/models")


def _ask(url: str) -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        with error:  # 401 comes from a server that is there; 503 from one that still loads
            return None if error.code < 500 else f"it answers {error.code}"
    except urllib.error.URLError as error:
        return f"no answer ({error.reason})"
    except (OSError, http.client.HTTPException) as error:
        return f"no answer ({error!r})"


# ---- life --------------------------------------------------------------------------------------------------


class Supervisor:
    """Keeps servers up until it is told to stop.

    Args:
      directory: receives a log file for each server.
      say: hears a line for each thing that happens.
      when_ready: called whenever all of them answer.
    """

    def __init__(self, servers: Iterable[Server], directory: pathlib.Path, say: Say, when_ready: Callable[[], object]):
        self._servers = [server for server in servers if server.command]
        self._directory = directory
        self._say = say
        self._when_ready = when_ready
        self._stop = asyncio.Event()
        self._ready: set[str] = set()

    def stop(self) -> None:
        """To be called in the loop's thread; a signal handler of the loop is."""
        self._stop.set()

    async def run(self) -> None:
        """Returns when all servers have ended, after `stop`.

        Raises:
          ConfigError: a command cannot be started, or its address is taken; the other servers have ended then too.
        """
        for server in self._servers:
            if problem := command_problem(server):
                raise ConfigError(problem)
        for server in self._servers:
            if await problem_of(server) is None:
                cure = "stop that one, or remove serve to use it as it is"
                raise ConfigError(f'expert "{server.expert}": something answers at {server.url} already; {cure}')
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--logs {self._directory} cannot be made ({error.strerror}); name another") from error
        try:
            async with asyncio.TaskGroup() as tasks:
                for server in self._servers:
                    tasks.create_task(self._keep_up(server))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _keep_up(self, server: Server) -> None:
        pause = FIRST_PAUSE
        while not self._stop.is_set():
            began = time.monotonic()
            with open(self._directory / server.log_name, "ab") as log:
                process = _started(server, log)
            try:
                self._say(f"{server.name}: started, process {process.pid}, {self._directory / server.log_name}")
                await self._watch(server, process, began)
            finally:
                self._ready.discard(server.url)
                await _ended(process)
            if self._stop.is_set():
                self._say(f"{server.name}: stopped")
                return
            lasted = time.monotonic() - began
            pause = FIRST_PAUSE if lasted > STEADY_SECONDS else pause
            said = _last_line(self._directory / server.log_name)
            how = f"ended with code {process.returncode} after {lasted:.1f} s"
            self._say(f"{server.name}: {how}, last line {said!r}; again in {pause:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _watch(self, server: Server, process: subprocess.Popen[bytes], began: float) -> None:
        """Returns when the process has ended, or is to end."""
        told = began
        while process.poll() is None and not self._stop.is_set():
            if server.url not in self._ready:
                problem = await problem_of(server)
                now = time.monotonic()
                if problem is None and process.poll() is None:
                    self._note_ready(server, now - began)
                elif now - told > NEWS_SECONDS:
                    told = now
                    self._say(f"{server.name}: not ready after {now - began:.0f} s: {problem}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK_SECONDS)

    def _note_ready(self, server: Server, seconds: float) -> None:
        self._ready.add(server.url)
        of_all = f"{len(self._ready)} of {len(self._servers)} servers"
        self._say(f"{server.name}: ready after {seconds:.1f} s ({of_all})")
        if len(self._ready) == len(self._servers):
            self._when_ready()


def _started(server: Server, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Raises ConfigError if there is no such command."""
    try:
        return subprocess.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        what = f'expert "{server.expert}": {server.command[0]!r} cannot be started ({error.strerror})'
        raise ConfigError(f"{what}; install it or correct serve") from error


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all of its group: asked first, then killed."""
    end = time.monotonic() + STOP_SECONDS
    _signal_group(process, signal.SIGTERM)
    try:
        while process.poll() is None and time.monotonic() < end:
            await asyncio.sleep(0.02)
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _last_line(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2000))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")[-200:]
