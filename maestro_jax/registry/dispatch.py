"""Runs calls: the registry (async, one event loop) and the dispatcher (the loop's thread, for the engine).

In: resolved calls with the task's question and images and the seconds left to the episode. Out:
observations. Nothing in here raises for a fault at run time: every call ends in a status.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from maestro_jax.errors import UserError
from maestro_jax.registry.description.config import ExpertConfig, LimitsConfig, Pair, RegistryConfig
from maestro_jax.registry.description.interface import CallRunner, Expert, Message, Request, Service
from maestro_jax.registry.description.names import normalise_name
from maestro_jax.registry.experts.http import HttpExpert
from maestro_jax.registry.experts.inprocess import InProcessExpert, InProcessService
from maestro_jax.registry.experts.retries import RetryBudget
from maestro_jax.registry.record.cache import CachedExpert, CachedService, ReplyCache
from maestro_jax.registry.record.journal import ASKER, Journal, JournaledExpert, JournaledService
from maestro_jax.registry.record.metering import MeteredExpert, Spending
from maestro_jax.registry.skills.running import Means, SkillInput, failure, run_called
from maestro_jax.registry.skills.served import ServedService
from maestro_jax.registry.skills.templates import said
from maestro_jax.sandbox.choose import make_sandbox
from maestro_jax.sandbox.interface import Sandbox
from maestro_jax.types import Call, Observation, Status, Usage

logger = logging.getLogger(__name__)

# A skill keeps its deadline by itself and then still reports its usage; past this many more seconds it is cut off.
GRACE_SECONDS = 0.1
CLOSE_SECONDS = 10.0


class ExpertStack(NamedTuple):
    """An expert and what stands before it."""

    bare: HttpExpert | InProcessExpert
    metered: MeteredExpert
    cached: CachedExpert | None

    def report(self, began: float) -> dict[str, Any]:
        """Plain values; times of breakers in seconds since `began`, a time of `time.monotonic`."""
        found = self.metered.counter.to_json() | {"cache_hits": self.cached.hits if self.cached else 0}
        if isinstance(self.bare, HttpExpert):
            found["breakers"] = {
                endpoint.url: [
                    [round(seconds - began, 3), state.value] for seconds, state in list(endpoint.breaker.changes)
                ]
                for endpoint in self.bare.endpoints.all
            }
            found["probes"] = {endpoint.url: endpoint.probes for endpoint in self.bare.endpoints.all}
        return found


class Registry:
    """Experts and services built from config, behind one `call`.

    Args:
      config: from `parse_registry`.
      cache_file: where replies of deterministic experts and services survive a restart; None keeps
        them in memory.
      journal: records what experts and services answer. What the run's journals hold already counts against its caps.
      processes: that share the run's caps, each with a registry of its own; nobody counts for all.
      from_main: what one of them computes for all (plain JSON), so that not all read all journals.
      sandbox: where programs of "run" stages run; None makes the one that the config names, if a skill needs it.

    Raises:
      ConfigError: an expert, a service or the sandbox cannot be built.
    """

    def __init__(
        self,
        config: RegistryConfig,
        cache_file: str | None = None,
        journal: Journal | None = None,
        sandbox: Sandbox | None = None,
        processes: int = 1,
        from_main: Callable[[Callable[[], Any]], Any] = lambda compute: compute(),
    ):
        self.config = config
        self.cache = ReplyCache(cache_file)
        calls, usage = 0, Usage()
        if journal and config.limits != LimitsConfig():
            calls, tokens_and_price = from_main(lambda: _plain(*journal.spent()))
            usage = Usage(*tokens_and_price)
        self.spending = Spending(config.limits, calls, usage, processes)
        self._began = time.monotonic()
        self._retries = RetryBudget(time.monotonic)
        self._stacks = [self._stack(entry, journal) for entry in config.experts]
        self._experts = {normalise_name(stack.bare.name): stack.cached or stack.metered for stack in self._stacks}
        self._services: dict[str, Service] = {}
        for part in config.services:
            if part.expert:
                model = normalise_name(part.expert)
                frame = config.experts_by_name[model].frame
                self._services[normalise_name(part.name)] = ServedService(part, self._experts[model], frame)
                continue
            helper = InProcessService(part)
            service: Service = JournaledService(helper, helper.identity, journal) if journal else helper
            self._services[normalise_name(part.name)] = (
                CachedService(service, helper.identity, self.cache) if part.deterministic else service
            )
        self._sandbox = sandbox or (make_sandbox(config.sandbox) if config.runs_code else None)

    def _stack(self, entry: ExpertConfig, journal: Journal | None) -> ExpertStack:
        bare = HttpExpert(entry, self._retries) if entry.endpoints else InProcessExpert(entry)
        asked: Expert = JournaledExpert(bare, bare.identity, journal) if journal else bare
        metered = MeteredExpert(asked, self.spending)
        cached = CachedExpert(metered, bare.identity, self.cache) if entry.cacheable else None
        return ExpertStack(bare, metered, cached)

    def resolve(self, expert: str, skill: str) -> Pair | str:
        """Canonical names, or the text of an error observation (see `RegistryConfig.resolve`)."""
        return self.config.resolve(expert, skill)

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        """Runs the skill with the expert; `deadline` is in seconds from now.

        Without a skill the expert is asked the question as it stands, whether the policy may call it or not.

        Raises:
          LimitError: a request was refused because the run has reached a cap (`registry.limits`).
        """
        if not call.skill:
            reply = await self._experts[normalise_name(call.expert)].ask(
                Request((Message("user", question, images),), deadline=deadline)
            )
            is_ok, found = reply.status is Status.OK, (reply.status, reply.seconds, reply.usage)
            observation = Observation(said(reply.text), *found) if is_ok else failure(*found)
        else:
            pair = self.resolve(call.expert, call.skill)
            if isinstance(pair, str):
                return Observation(pair, Status.UNKNOWN)
            given = SkillInput(question, call.query, images)
            named = self.config.skills_by_name[normalise_name(pair.skill)]
            expert = normalise_name(pair.expert)
            frame = self.config.experts_by_name[expert].frame
            means = Means(self._experts[expert], self._services, self._sandbox, frame)
            observation = await run_called(self.config, named, means, given, deadline)
        if observation.status is not Status.OK:
            self.spending.check()
        return observation

    def report(self) -> dict[str, dict[str, Any]]:
        """By expert: requests, success, latencies, tokens, price, cache hits, and what each endpoint's breaker did."""
        return {stack.bare.name: stack.report(self._began) for stack in self._stacks}

    def shunned(self) -> dict[str, str]:
        """Experts and services that cannot be asked right now, with the reason; for any thread.

        Those whose every endpoint is left alone (`breaker.py`). What asks them meanwhile ends as UNAVAILABLE. They are
        probed without anybody's doing. Classes of this process are never shunned: their processes are started again.
        """
        found = {}
        for stack in self._stacks:
            if isinstance(stack.bare, HttpExpert) and (why := stack.bare.endpoints.shunned):
                found[normalise_name(stack.bare.name)] = why
        names = {entry.name: entry.name for entry in self.config.experts}
        names |= {entry.name: entry.expert for entry in self.config.services if entry.expert}
        return {name: found[model] for name, asked in names.items() if (model := normalise_name(asked)) in found}

    async def close(self) -> None:
        self.cache.close()
        await asyncio.gather(*(expert.close() for expert in self._experts.values()))
        await asyncio.gather(*(service.close() for service in self._services.values()))
        if self._sandbox is not None:
            await self._sandbox.close()


def _plain(calls: int, usage: Usage) -> tuple[int, tuple[Any, ...]]:
    return calls, dataclasses.astuple(usage)


class Dispatcher:
    """Hosts the registry's event loop in a daemon thread; the engine's side never blocks on an expert.

    It owns the registry and closes it. Every submitted ticket comes back from `collect` exactly once; who asks beside
    the engine gets a future of his own (`ask`). A journal records every call that has ended; it is the caller's to
    close.

    Attributes:
      reader: called with every ticket and its observation before `collect` gives it, in the registry's thread where
        there was one to run the call: for what would take the engine's time.
    """

    reader: Callable[[int, Observation], None] | None = None

    def __init__(self, registry: CallRunner, journal: Journal | None = None):
        self._registry = registry
        self._journal = journal
        self._ready: deque[tuple[int, Observation]] = deque()
        self._arrived = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._stop: UserError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="registry", daemon=True)
        self._thread.start()

    def submit(
        self,
        ticket: int,
        call: Call,
        question: str,
        images: tuple[bytes, ...],
        deadline: float,
        asker: str | None = None,
    ) -> None:
        """Starts a call; returns at once.

        Args:
          deadline: in seconds from now.
          asker: who asks, the same in every run (`record/journal.py`); where there is none, the ticket has to be.
        """
        asker = f"ticket {ticket}" if asker is None else asker
        self._start(lambda seen: self._finish(ticket, seen), call, question, images, deadline, asker)

    def ask(
        self, call: Call, question: str, images: tuple[bytes, ...], deadline: float, asker: str
    ) -> concurrent.futures.Future[Observation]:
        """As `submit`, for a caller who waits for this call alone: `collect` does not give it."""
        future = concurrent.futures.Future[Observation]()
        self._start(future.set_result, call, question, images, deadline, asker)
        return future

    def _start(
        self,
        tell: Callable[[Observation], None],
        call: Call,
        question: str,
        images: tuple[bytes, ...],
        deadline: float,
        asker: str,
    ) -> None:
        end = time.monotonic() + deadline

        def start() -> None:
            task = self._loop.create_task(self._run(tell, call, question, images, end, asker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        with self._arrived:  # the same lock as in `close`: nothing is scheduled on a loop that stops
            if not self._closed:
                self._loop.call_soon_threadsafe(start)
                return
        tell(failure(Status.UNAVAILABLE))

    def void(self, askers: Sequence[str]) -> None:
        """Their last calls do not count, since they are made again."""
        if self._journal is not None and askers:
            self._journal.void(askers)

    def collect(self) -> list[tuple[int, Observation]]:
        """All observations that are ready, in the order they arrived; never blocks."""
        with self._arrived:
            ready = list(self._ready)
            self._ready.clear()
        return ready

    def wait(self, timeout: float) -> bool:
        """Blocks until an observation is ready or `timeout` seconds have passed; says whether one is ready."""
        with self._arrived:
            return self._arrived.wait_for(lambda: bool(self._ready), timeout)

    def shunned(self) -> dict[str, str]:
        """Experts and services that cannot be asked right now, with the reason (see `Registry.shunned`)."""
        return self._registry.shunned()

    def check(self) -> None:
        """Raises what a call ended with that only the user can mend, such as a cap that is reached.

        For the thread that runs the loop of the engine: callbacks must not raise.
        """
        if self._stop is not None:
            raise self._stop

    def close(self) -> None:
        """Cancels what runs (it ends as UNAVAILABLE), closes the registry and stops the thread."""
        with self._arrived:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(CLOSE_SECONDS)
        except Exception:  # closing must not hide the error that made the caller close
            logger.exception("the registry did not close cleanly")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _run(
        self,
        tell: Callable[[Observation], None],
        call: Call,
        question: str,
        images: tuple[bytes, ...],
        end: float,
        asker: str,
    ) -> None:
        ASKER.set(asker)
        observation = failure(Status.UNAVAILABLE)  # stays if the task is cancelled by `close`
        try:
            observation = await self._outcome(call, question, images, end)
            if self._journal is not None:
                self._journal.call(asker, call, question, images, observation)
        except UserError as error:
            self._stop = error
        finally:
            tell(observation)

    async def _outcome(self, call: Call, question: str, images: tuple[bytes, ...], end: float) -> Observation:
        start = time.monotonic()
        try:
            left = max(0.0, end - start)
            async with asyncio.timeout(left + GRACE_SECONDS):
                return await self._registry.call(call, question, images, left)
        except TimeoutError:
            return failure(Status.TIMEOUT, time.monotonic() - start)
        except UserError:
            raise
        except Exception:
            logger.exception("call to %s with %s failed", call.expert, call.skill)
            return failure(Status.UNAVAILABLE, time.monotonic() - start)

    def _finish(self, ticket: int, observation: Observation) -> None:
        if self.reader is not None:
            try:
                self.reader(ticket, observation)
            except Exception:  # the ticket has to come back whatever happens
                logger.exception("the reply to ticket %d could not be read ahead", ticket)
        with self._arrived:
            self._ready.append((ticket, observation))
            self._arrived.notify_all()

    async def _shut_down(self) -> None:
        # A task cancelled before its first step would never run its `finally`: let pending ones start.
        await asyncio.sleep(0)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._registry.close()
