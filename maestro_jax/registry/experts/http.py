"""Experts behind OpenAI-compatible servers.

In: requests. Out: replies; every fault ends in a status (`Outcome`), within the request's deadline. One request is up
to three attempts (`retries.py`), each on the endpoint that has least to do (`endpoints.py`) and is not left alone
(`breaker.py`). Connections are kept; what runs when the deadline passes is cancelled and its connection closed. An
endpoint that is left alone is asked for one token now and then, so that it is used again soon after it is back.
"""

import asyncio
import dataclasses
import datetime
import io
import json
import logging
import os
import random
import time
from typing import Any, NamedTuple

import aiohttp

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.interface import Message, Reply, Request, Sampling
from maestro_jax.registry.experts.chat import (
    BadImageError,
    BadReplyError,
    Completion,
    Quirk,
    estimate_tokens,
    read_completion,
    read_models,
    request_body,
)
from maestro_jax.registry.experts.endpoints import Endpoint, Endpoints, Lease, NoEndpointError
from maestro_jax.registry.experts.proxies import proxy_of
from maestro_jax.registry.experts.retries import RetryBudget, RetryConfig, parse_retry_after
from maestro_jax.types import Status, Usage

logger = logging.getLogger(__name__)

MAX_BODY = 2**20  # bytes of a reply; more are not read
CONNECT_SECONDS = 5.0
FAIR_SHARE = 0.5  # of what an attempt may take; a server that is silent for so long has failed, whoever gave up on it
LIST_SECONDS = 5.0  # to hear which models there are
PROBE = Message("user", "Reply with one word: ready.")
IDLE_SECONDS = 4.0  # a kept connection; uvicorn closes after 5, and a request must not meet that
QUOTE_SECONDS = 1.0  # to hear why a server refuses
QUOTE = 300  # characters of it
RETRIES = RetryConfig()
LARGE = 2**20  # bytes of a request from which on aiohttp wants a file, to send it piece by piece
LEAST_SECRET = 8  # characters of a key; a shorter one ("EMPTY", "none") is a placeholder, and may be a word of a reply
HIDDEN = "[key]"

# Refusals that may pass. All others below 500 (and redirects, which are not followed: they would carry the key
# elsewhere) are there to stay until somebody changes the set-up.
_PASSING = (408, 409, 425, 429)

_CURES = {
    400: (
        "the server refuses the request; compare model, max_tokens, images and options with what it serves, and give "
        "fields that it does not take another name, or none, in `rename`"
    ),
    401: "set the environment variable that `key` names to a valid key",
    403: "use a key that may use this model",
    404: "check endpoints (they usually end in /v1) and model",
    407: "write the proxy's password into HTTP_PROXY or HTTPS_PROXY, or name the host in NO_PROXY",
    422: (
        "the server refuses a field of the request; compare options and sampling with what it serves, or leave the "
        "field out in `rename`"
    ),
}
_OTHER_CURE = "check endpoints, model and options"


class Outcome(NamedTuple):
    """How an attempt ended.

    Attributes:
      completion: there if and only if `status` is OK.
      is_busy: the server refuses since it has too much to do; nothing is wrong with it.
      retry_after: seconds that the server asked to be left alone.
      why: what went wrong; one of few texts, so that each is logged once.
      said: what the server said to it.
      is_fault: the server answered, with a fault of its own.
    """

    status: Status
    completion: Completion | None = None
    is_busy: bool = False
    retry_after: float = 0.0
    why: str = ""
    said: str = ""
    is_fault: bool = False

    @property
    def is_worth_another(self) -> bool:
        return self.status in (Status.TIMEOUT, Status.UNAVAILABLE)


@dataclasses.dataclass(frozen=True)
class Trial:
    """How one endpoint did: how the attempt ended, after how many seconds, and, if refused, which models it lists."""

    url: str
    outcome: Outcome
    seconds: float
    listed: str


class HttpExpert:
    """An expert behind one or several servers (see `registry.description.interface.Expert`); of one event loop.

    Args:
      config: with `endpoints`.
      budget: of retries, shared by all experts of a run.

    Raises:
      ConfigError: the environment variable of the key is not set, or cannot be sent; a proxy's variable names none, or
        the proxy could read the key.
    """

    def __init__(self, config: ExpertConfig, budget: RetryBudget, retries: RetryConfig = RETRIES):
        self.name = config.name
        self.identity = http_identity(config)
        self.endpoints = Endpoints(config.endpoints, config.concurrency, retries, time.monotonic)
        self._config, self._budget, self._retries = config, budget, retries
        self._sampling = Sampling(config.temperature, config.max_tokens, config.top_p)
        self._key = _read_key(config)
        self._proxies = {each: self._proxy_of(each) for each in self.endpoints.all}
        self._session: aiohttp.ClientSession | None = None  # made on the event loop
        self._seen: set[str] = set()  # what has been logged
        self._probing: dict[Endpoint, asyncio.Task[None]] = {}

    async def ask(self, request: Request) -> Reply:
        start = time.monotonic()
        try:
            body = self._body(request)
        except BadImageError as error:
            self._log(Outcome(Status.CONFIG_ERROR, why=f"a request was not sent: {error}"))
            return Reply("", Status.CONFIG_ERROR)
        self._budget.offer()
        outcome = await self._try(body, start + request.deadline)
        seconds = time.monotonic() - start
        if outcome.completion is None:
            return Reply("", outcome.status, seconds=seconds)
        return Reply(outcome.completion.text, Status.OK, self._usage(outcome.completion, request), seconds)

    async def close(self) -> None:
        probing = list(self._probing.values())
        for task in probing:
            task.cancel()
        await asyncio.gather(*probing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- attempts ------------------------------------------------------------------------------------------

    async def _try(self, body: bytes, end: float) -> Outcome:
        """Attempts until one is good, or no other is worth its wait; `end` is a time of `time.monotonic`."""
        failures = 0
        tried: set[Endpoint] = set()
        while True:
            outcome = await self._attempt(body, end, tried)
            if outcome.status is Status.OK:
                return outcome
            self._log(outcome)
            if outcome.is_busy:
                continue  # to the end of the line, which moves when the server wants; no failure, no retry
            failures += 1
            if not outcome.is_worth_another or failures == self._retries.attempts:
                return outcome
            wait = self._retries.wait(failures, outcome.retry_after, random.random)
            in_time = time.monotonic() + wait < end and self.endpoints.admit
            if not in_time or not self._budget.take():
                return outcome
            await asyncio.sleep(wait)

    async def _attempt(self, body: bytes, end: float, tried: set[Endpoint]) -> Outcome:
        """One attempt on one endpoint, which joins those tried; it hears how the attempt ended."""
        try:
            with await self.endpoints.lease(end, tried) as lease:
                tried.add(lease.endpoint)
                seconds = min(end - time.monotonic(), self._config.attempt_timeout)
                outcome = await self._post(lease.endpoint, body, seconds, lease)
                if outcome.status is Status.TIMEOUT and seconds < FAIR_SHARE * self._limit(lease):
                    return outcome  # cut short by its caller: says nothing about the endpoint
                if outcome.is_busy:
                    is_failure = lease.refused(outcome.retry_after)
                    self._watch(lease.endpoint)
                    return outcome._replace(is_busy=not is_failure)
                if outcome.is_worth_another:
                    lease.failed(outcome.why)
                    self._watch(lease.endpoint)
                else:
                    lease.succeeded()
                return outcome
        except TimeoutError:
            return Outcome(Status.TIMEOUT, why="no turn before the deadline (more endpoints or concurrency would help)")
        except NoEndpointError as error:
            return Outcome(Status.UNAVAILABLE, why=str(error))

    def _limit(self, lease: Lease) -> float:
        """Seconds that the attempt may take for what it is about: its connection, or its reply."""
        whole = self._config.attempt_timeout
        return whole if lease.is_connected else min(whole, CONNECT_SECONDS)

    async def _post(self, endpoint: Endpoint, body: bytes, seconds: float, lease: Lease | None = None) -> Outcome:
        """Sends a request and reads its reply, in so many seconds; `lease` hears of its connection."""
        data = body if len(body) < LARGE else io.BytesIO(body)
        url = f"{endpoint.url}/chat/completions"
        try:
            async with (
                asyncio.timeout(seconds),
                self._client().post(
                    url,
                    data=data,
                    allow_redirects=False,
                    trace_request_ctx=lease,
                    proxy=self._proxies[endpoint],
                ) as response,
            ):
                if response.status != 200:
                    return await self._refusal(response)
                return Outcome(Status.OK, self._read(await read_body(response)))
        except aiohttp.ConnectionTimeoutError:
            return Outcome(Status.UNAVAILABLE, why=f"no connection within {CONNECT_SECONDS:g} s")
        except TimeoutError:
            return Outcome(Status.TIMEOUT, why="no reply in time")
        except BadReplyError as error:
            return Outcome(Status.UNAVAILABLE, why=str(error), is_fault=True)
        except (aiohttp.ClientError, OSError) as error:
            return Outcome(Status.UNAVAILABLE, why=f"no connection ({type(error).__name__})")

    def _read(self, body: bytes) -> Completion:
        """What a server said, without the key, which some repeat: it must not reach journal, cache or policy."""
        found = read_completion(body)
        if self._key in found.text and len(self._key) >= LEAST_SECRET:
            return found._replace(text=found.text.replace(self._key, HIDDEN))
        return found

    async def _refusal(self, response: aiohttp.ClientResponse) -> Outcome:
        code, why = response.status, f"HTTP {response.status}"
        if code >= 500 or code in _PASSING:
            asked = response.headers.get("Retry-After", "")
            is_busy = code == 429 or (code == 503 and bool(asked))
            if is_busy:
                await _quote(response)  # a connection is kept only if its reply was read
            seconds = parse_retry_after(asked, datetime.datetime.now(datetime.UTC))
            return Outcome(Status.UNAVAILABLE, is_busy=is_busy, retry_after=seconds, why=why, is_fault=not is_busy)
        cure = _CURES.get(code, _OTHER_CURE)
        return Outcome(Status.CONFIG_ERROR, why=f"{why}; {cure}", said=self._redacted(await _quote(response)))

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),  # `Endpoints` limits
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=headers,
                auto_decompress=False,  # a small body could hold a huge one
                trace_configs=[_tell_of_connections()],
            )
        return self._session

    # ---- probes --------------------------------------------------------------------------------------------

    def _watch(self, endpoint: Endpoint) -> None:
        """Sees to it that an endpoint that is left alone is probed until it is back."""
        if not endpoint.breaker.admits and endpoint not in self._probing:
            logger.warning(
                'expert "%s": %s is left alone until it is back (%s)', self.name, endpoint.url, endpoint.fault
            )
            self._probing[endpoint] = asyncio.create_task(self._probe(endpoint))

    async def _probe(self, endpoint: Endpoint) -> None:
        """Asks for one token, in words only, until the endpoint is asked as usual.

        Not for the list of models: servers whose engine is dead still have it.
        """
        body = self._body(Request((PROBE,), dataclasses.replace(self._sampling, max_tokens=1)))
        # As long as any request may take: a server that thinks for long before its first token is well.
        seconds = self._config.attempt_timeout
        try:
            while lease := await self.endpoints.probe(endpoint):
                with lease:
                    outcome = await self._post(endpoint, body, seconds, lease)
                    if outcome.is_busy:
                        lease.refused(outcome.retry_after)
                    if outcome.is_fault:
                        lease.faulted(outcome.why)
                    elif outcome.is_worth_another:
                        lease.failed(outcome.why)
                    else:
                        lease.succeeded()
            logger.warning('expert "%s": %s is back', self.name, endpoint.url)
        finally:
            del self._probing[endpoint]

    # ---- requests, usage, words ----------------------------------------------------------------------------

    def _proxy_of(self, endpoint: Endpoint) -> str | None:
        try:
            found = proxy_of(endpoint.url, bool(self._key))
        except ConfigError as error:
            raise ConfigError(f'expert "{self.name}": {error}') from error
        if found:
            logger.warning('expert "%s": %s is reached through a proxy of the environment', self.name, endpoint.url)
        return found

    def _body(self, request: Request) -> bytes:
        config, sampling = self._config, request.sampling or self._sampling
        return request_body(config.model, request.messages, sampling, config.options, config.rename)

    def _usage(self, completion: Completion, request: Request) -> Usage:
        for quirk in completion.quirks:
            self._log(Outcome(Status.OK, why=quirk))
        is_estimated = Quirk.NO_USAGE in completion.quirks
        prompt = estimate_tokens(request.messages) if is_estimated else completion.prompt_tokens
        return self._config.priced(prompt, completion.completion_tokens)

    def _log(self, outcome: Outcome) -> None:
        """Says what went wrong; each kind of it once."""
        if outcome.why not in self._seen:
            self._seen.add(outcome.why)
            said = f' (it says: "{outcome.said}")' if outcome.said else ""
            logger.warning('expert "%s": %s%s; further ones are not logged', self.name, outcome.why, said)

    def _redacted(self, text: str) -> str:
        """One short line; servers like to repeat the key that they refuse."""
        line = " ".join(text.split())
        return (line.replace(self._key, HIDDEN) if self._key else line)[:QUOTE]

    # ---- trial ---------------------------------------------------------------------------------------------

    async def try_each(self, request: Request) -> list[Trial]:
        """Asks every endpoint once, past retries, breakers and turns: to find out before a run what one would meet."""
        body = self._body(request)
        return await asyncio.gather(*(self._trial(each, body, request.deadline) for each in self.endpoints.all))

    async def _trial(self, endpoint: Endpoint, body: bytes, seconds: float) -> Trial:
        start = time.monotonic()
        outcome = await self._post(endpoint, body, min(seconds, self._config.attempt_timeout))
        listed = await self._listed(endpoint) if outcome.status is Status.CONFIG_ERROR else ""
        return Trial(endpoint.url, outcome, time.monotonic() - start, listed)

    async def _listed(self, endpoint: Endpoint) -> str:
        """Names of the models that it serves, on a short line; not every server lists them."""
        # Not kept: after an exception uvicorn replies and closes, and the next request would meet that.
        once = {"Connection": "close"}
        try:
            async with (
                asyncio.timeout(LIST_SECONDS),
                self._client().get(
                    f"{endpoint.url}/models", headers=once, allow_redirects=False, proxy=self._proxies[endpoint]
                ) as response,
            ):
                names = read_models(await read_body(response)) if response.status == 200 else []
        except (TimeoutError, BadReplyError, aiohttp.ClientError, OSError):
            return ""
        return self._redacted(", ".join(names))


def _tell_of_connections() -> aiohttp.TraceConfig:
    """Tells the lease of an attempt that it has a connection, a new one or one that was kept."""

    async def tell(session: aiohttp.ClientSession, context: Any, what: object) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx.connected()

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(tell)
    tracing.on_connection_reuseconn.append(tell)
    return tracing


def http_identity(config: ExpertConfig) -> str:
    """What a kept reply depends on besides the request. Not where the model is served: ports change."""
    sampling = Sampling(config.temperature, config.max_tokens, config.top_p)
    options = json.dumps(dict(config.options), sort_keys=True)
    rename = f" {json.dumps(dict(config.rename), sort_keys=True)}" if config.rename else ""
    return f"http {config.name} {config.model} {dataclasses.astuple(sampling)} {options}{rename}"


def _read_key(config: ExpertConfig) -> str:
    if not config.key:
        return ""
    key = os.environ.get(config.key, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f'expert "{config.name}": environment variable {config.key} is not set to a key; '
            "export it, or leave `key` out if the server needs none"
        )
    return key


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body.

    Raises:
      BadReplyError: it is longer than `MAX_BODY`, or compressed though nobody asked for that.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise BadReplyError("the body is compressed")
    body, content = bytearray(), response.content
    while not content.at_eof():
        body += await content.readany()
        if max(len(body), response.content_length or 0) > MAX_BODY:
            raise BadReplyError(f"the body has more than {MAX_BODY} bytes")
    return bytes(body)


async def _quote(response: aiohttp.ClientResponse) -> str:
    """The beginning of what a server says to its refusal, if it says so at once."""
    try:
        async with asyncio.timeout(QUOTE_SECONDS):
            return (await response.content.read(4 * QUOTE)).decode("utf-8", "replace")
    except (TimeoutError, aiohttp.ClientError):
        return ""
