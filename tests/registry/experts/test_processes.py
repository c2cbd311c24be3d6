"""Specialists in processes of their own: crashes, hangs, replies that are too long, and what is left behind."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.config import ExpertConfig, ServiceConfig
from maestro_jax.registry.description.interface import Message, Reply, Request
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.experts.implementations import MAX_TEXT
from maestro_jax.registry.experts.inprocess import InProcessExpert, InProcessService
from maestro_jax.types import Status

HOSTED = "tests.registry.hosted"
SECONDS = 60.0  # far above what is needed: a hang fails instead of hanging the suite


def descendants(pid: int) -> set[int]:
    """Processes below this one that are not yet gone; zombies, too."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, left = set(), [pid]
    while left:
        below = children.get(left.pop(), [])
        found.update(below)
        left += below
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    processes, threads = descendants(os.getpid()), set(threading.enumerate())
    yield
    assert descendants(os.getpid()) - processes == set()
    assert [thread for thread in set(threading.enumerate()) - threads if thread.name == "specialist E"] == []


@contextlib.asynccontextmanager
async def hosted(cls: str = "Obeys", **fields: Any) -> AsyncIterator[InProcessExpert]:
    expert = InProcessExpert(ExpertConfig("E", "", f"{HOSTED}:{cls}", processes=True, **fields))
    try:
        yield expert
    finally:
        await expert.close()


async def say(expert: InProcessExpert, text: str, deadline: float = SECONDS) -> Reply:
    return await expert.ask(Request((Message("user", text),), deadline=deadline))


def test_a_request_and_its_reply_travel_whole() -> None:
    images = b"\x00\n\xff", b""
    messages = Message("system", "\ud800 </answer>\n\u2028"), Message("user", "echo", images)

    async def scenario() -> None:
        async with hosted(options={"sizes": (1, 2)}) as expert:
            reply = await expert.ask(Request(messages, deadline=SECONDS))
            assert reply.text == f"system {messages[0].text!r} {[image.hex() for image in images]}"
        service = InProcessService(ServiceConfig("E", f"{HOSTED}:Mirror", processes=True))
        made = await service.run(images, "text\n", SECONDS)
        assert (made.text, made.images, made.status) == ("text\n", images, Status.OK)
        await service.close()

    asyncio.run(scenario())


def test_a_crash_ends_one_call_and_the_worker_is_there_again() -> None:
    async def scenario() -> None:
        async with hosted() as expert:
            first, second = [(await say(expert, "who")).text.split() for _ in range(2)]
            assert (first[0], first[1], second[1]) == (second[0], "1", "2")
            crashed = await say(expert, "exit 3")
            assert (crashed.text, crashed.status) == ("", Status.UNAVAILABLE)
            pid, asked = (await say(expert, "who")).text.split()
            assert pid != first[0] and asked == "1"

    asyncio.run(scenario())


def test_signals_that_stop_a_run_end_no_worker() -> None:
    """Slurm sends them to every process of a job, and a run that saves first still needs its experts."""

    async def scenario() -> None:
        async with hosted() as expert:
            pid = (await say(expert, "who")).text.split()[0]
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(int(pid), number)
            assert (await say(expert, "who")).text.split() == [pid, "2"]

    asyncio.run(scenario())


@pytest.mark.parametrize("hang", ["hang", "hang with child"])
def test_a_late_worker_is_ended_with_all_that_it_started(hang: str) -> None:
    async def scenario() -> None:
        async with hosted() as expert:
            pid = int((await say(expert, "who")).text.split()[0])
            began = time.monotonic()
            assert (await say(expert, hang, deadline=0.5)).status is Status.TIMEOUT
            assert time.monotonic() - began < SECONDS / 2
            assert (await say(expert, "who")).status is Status.OK
            assert pid not in descendants(os.getpid())

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["raise", "quit", f"write {MAX_TEXT + 1}"])
def test_a_fault_of_the_class_ends_no_process(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with hosted() as expert:
            before = (await say(expert, "who")).text.split()[0]
            with caplog.at_level(logging.ERROR):
                reply = await say(expert, fault)
            assert (reply.text, reply.status) == ("", Status.UNAVAILABLE)
            assert (await say(expert, "who")).text.split()[0] == before

    asyncio.run(scenario())
    assert 'expert "E" failed' in caplog.text


def test_the_longest_text_comes_through() -> None:
    async def scenario() -> None:
        async with hosted() as expert:
            assert len((await say(expert, f"write {MAX_TEXT}")).text) == MAX_TEXT

    asyncio.run(scenario())


def test_workers_work_side_by_side_and_the_rest_waits_for_its_turn() -> None:
    async def scenario() -> None:
        async with hosted(workers=2) as expert:
            stuck = asyncio.create_task(say(expert, "hang", deadline=3.0))
            await asyncio.sleep(0)
            texts = [(await say(expert, "who")).text for _ in range(3)]  # by the other one
            assert len({text.split()[0] for text in texts}) == 1
            late = await asyncio.gather(*(say(expert, "sleep 2", deadline=1.0) for _ in range(3)))
            assert {reply.status for reply in late} == {Status.TIMEOUT}
            assert (await stuck).status is Status.TIMEOUT
            both = await asyncio.gather(*(say(expert, "sleep 0.5") for _ in range(2)))
            assert len({reply.text.split()[0] for reply in both}) == 2

    asyncio.run(scenario())


def test_a_request_given_up_before_its_turn_ends_nobody_elses() -> None:
    async def scenario() -> None:
        async with hosted() as expert:
            busy = asyncio.create_task(say(expert, "sleep 1"))
            await asyncio.sleep(0)
            assert (await say(expert, "hang", deadline=0.1)).status is Status.TIMEOUT
            assert (await busy).status is Status.OK

    asyncio.run(scenario())


def test_a_worker_that_is_built_slowly_is_there_for_later_requests() -> None:
    """No deadline is long enough for it; it would never come back if it were ended while it is built."""

    async def scenario() -> None:
        async with hosted("Slow", options={"seconds": 1.0}) as expert:
            assert (await say(expert, "hang", deadline=0.2)).status is Status.TIMEOUT
            assert (await say(expert, "who", deadline=0.2)).status is Status.TIMEOUT
            async with asyncio.timeout(SECONDS):
                while (await say(expert, "who", deadline=0.2)).status is not Status.OK:
                    pass

    asyncio.run(scenario())


def test_closing_ends_what_runs() -> None:
    async def scenario() -> Status:
        async with hosted() as expert:
            await say(expert, "who")
            before = descendants(os.getpid())
            running = asyncio.create_task(say(expert, "hang with child"))
            while descendants(os.getpid()) == before:
                await asyncio.sleep(0.01)
        return (await running).status

    assert asyncio.run(scenario()) is Status.UNAVAILABLE


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        ("Obeys", {"colour": "red"}, r'^expert "E" cannot be built .*colour.*correct its options'),
        ("DiesYoung", {}, r'^expert "E": its process has ended \(exit code 7\) before .*DiesYoung was built'),
    ],
)
def test_what_cannot_be_built_is_said_at_once(cls: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        InProcessExpert(ExpertConfig("E", "", f"{HOSTED}:{cls}", options=options, processes=True, workers=2))


def test_processes_end_with_the_one_that_started_them() -> None:
    """Also where that is killed while one of them hangs."""
    program = (
        "import asyncio, os, signal\n"
        "from maestro_jax.registry.description.config import ExpertConfig\n"
        "from maestro_jax.registry.experts.inprocess import InProcessExpert\n"
        "from maestro_jax.registry.description.interface import Message, Request\n"
        f"expert = InProcessExpert(ExpertConfig('E', '', '{HOSTED}:Obeys', processes=True, workers=2))\n"
        "async def main():\n"
        "    reply = await expert.ask(Request((Message('user', 'who'),)))\n"
        "    asyncio.create_task(expert.ask(Request((Message('user', 'hang'),))))\n"
        "    await asyncio.sleep(0.3)\n"
        "    print(reply.text, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    pid = int(found.stdout.split()[0])
    end = time.monotonic() + SECONDS
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < end
        time.sleep(0.02)


def registry(**fields: Any) -> dict[str, Any]:
    expert = {"name": "E", "description": "", "implementation": f"{HOSTED}:Obeys"} | fields
    skill = {"name": "S", "stages": ({"kind": "ask", "output": "a", "prompt": "{question}"},)}
    return {"experts": (expert,), "services": (), "skills": (skill,)}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"workers": 0}, r'expert "E": workers must be at least 1, found 0'),
        ({"processes": True, "options": {"a": object()}}, r'expert "E": options go to other processes as literals'),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_registry(registry(**fields))
