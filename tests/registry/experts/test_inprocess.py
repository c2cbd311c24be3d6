"""In-process experts and services: replies, usage, deadlines, faults, imitated latency."""

import asyncio
import logging
import threading
import types
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig, ServiceConfig
from maestro_jax.registry.description.interface import Message, Reply, Request, ServiceResult
from maestro_jax.registry.experts import inprocess
from maestro_jax.registry.experts.implementations import MAX_TEXT
from maestro_jax.registry.experts.inprocess import InProcessExpert, InProcessService, Workers
from maestro_jax.types import Status, Usage


def make(cls: str, **fields: Any) -> InProcessExpert:
    return InProcessExpert(ExpertConfig("E", "", f"fake_specialists:{cls}", **fields))


def request(text: str = "how many dots", deadline: float = 30.0) -> Request:
    return Request((Message("user", text, (b"png",)),), deadline=deadline)


def ask(expert: InProcessExpert, asked: Request) -> Reply:
    return asyncio.run(expert.ask(asked))


def run(cls: str, deadline: float = 30.0) -> ServiceResult:
    service = InProcessService(ServiceConfig("s", f"fake_specialists:{cls}"))
    return asyncio.run(service.run((b"png",), "", deadline))


def test_reply_carries_text_and_price_of_its_words() -> None:
    reply = ask(make("Echo", price_prompt=1.0, price_completion=10.0), request())
    assert (reply.text, reply.status) == ("echo how many dots 1", Status.OK)
    assert reply.usage == Usage(3, 5, (3 * 1.0 + 5 * 10.0) / 1e6)


def test_passed_deadline_is_a_timeout() -> None:
    reply = ask(make("Hang"), request(deadline=0.01))
    assert (reply.text, reply.status) == ("", Status.TIMEOUT)


def test_own_timeout_holds_where_it_is_shorter() -> None:
    assert ask(make("Hang", timeout=0.01), request()).status is Status.TIMEOUT


def test_a_job_given_up_before_its_turn_is_never_run() -> None:
    started, gate, ran = threading.Event(), threading.Event(), []

    def block(specialist: object) -> None:
        started.set()
        gate.wait()

    async def scenario() -> None:
        workers = Workers("w", object())
        blocking = asyncio.create_task(workers.call(block))
        await asyncio.to_thread(started.wait)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await workers.call(lambda specialist: ran.append(1))
        gate.set()
        await blocking
        await workers.call(lambda specialist: None)  # the queue is drained up to here
        await workers.close()

    asyncio.run(scenario())
    assert ran == []


@pytest.mark.parametrize("cls", ["Crash", "NotText"])
def test_a_broken_specialist_is_unavailable_and_its_message_only_logged(
    cls: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        reply = ask(make(cls), request())
    assert (reply.text, reply.status) == ("", Status.UNAVAILABLE)
    assert 'expert "E" failed' in caplog.text


def test_workers_have_instances_of_their_own_and_work_side_by_side(specialists: types.ModuleType) -> None:
    """The first two wait for each other, each in its own; a third one has to wait for its turn."""
    together, ids = threading.Barrier(2), set()

    class Meets:
        def answer(self, messages: object) -> str:
            ids.add(id(self))
            together.wait(30.0)
            return "met"

    specialists.Meets = Meets  # type: ignore[attr-defined]

    async def scenario() -> list[Status]:
        expert = make("Meets", workers=2)
        late = request(deadline=0.05)
        replies = [await expert.ask(late), *await asyncio.gather(*(expert.ask(request()) for _ in range(3)))]
        await expert.close()
        return [reply.status for reply in replies]

    assert asyncio.run(scenario()) == [Status.TIMEOUT, Status.OK, Status.OK, Status.OK]
    assert len(ids) == 2


def test_a_text_that_is_too_long_is_a_fault(specialists: types.ModuleType) -> None:
    long = types.SimpleNamespace(answer=lambda messages: "x" * (MAX_TEXT + 1))
    specialists.Long = lambda: long  # type: ignore[attr-defined]
    assert ask(make("Long"), request()).status is Status.UNAVAILABLE


def test_replies_are_known_by_the_class_whoever_gives_them() -> None:
    assert make("Echo").identity == make("Echo", workers=3).identity


def test_wrong_options_name_the_expert() -> None:
    with pytest.raises(ConfigError, match=r'^expert "E" cannot be built .*colour.*correct its options'):
        make("Echo", options={"colour": "red"})


def sleeps_of(monkeypatch: pytest.MonkeyPatch, expert: InProcessExpert, texts: list[str]) -> list[float]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def ask_all() -> None:
        for text in texts:
            await expert.ask(request(text))

    monkeypatch.setattr(inprocess.asyncio, "sleep", sleep)
    asyncio.run(ask_all())
    return slept


def test_latency_belongs_to_the_request_not_to_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    first = sleeps_of(monkeypatch, make("Echo", latency_mean=1.0), ["a", "b", "c"])
    again = sleeps_of(monkeypatch, make("Echo", latency_mean=1.0), ["c", "b", "a"])
    assert first == again[::-1] and len(set(first)) == 3


def test_latency_is_exponential_around_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = sleeps_of(monkeypatch, make("Echo", latency_mean=2.0, latency_seed=1), [str(i) for i in range(400)])
    assert sum(slept) / len(slept) == pytest.approx(2.0, rel=0.15)
    assert sorted(slept)[200] == pytest.approx(2.0 * 0.693, rel=0.2)


def test_latency_counts_against_the_deadline() -> None:
    assert ask(make("Echo", latency_mean=1e6), request(deadline=0.01)).status is Status.TIMEOUT


def test_service_gives_text_and_images() -> None:
    result = run("Words")
    assert (result.text, result.images, result.status) == ("words of 1", (b"png", b"png"), Status.OK)


def test_broken_service_is_unavailable() -> None:
    assert run("BrokenService").status is Status.UNAVAILABLE


def test_late_service_is_a_timeout() -> None:
    assert run("Words", deadline=0.0).status is Status.TIMEOUT


def test_identity_tells_options_apart() -> None:
    assert make("Echo").identity != make("Echo", options={"mark": "x"}).identity
