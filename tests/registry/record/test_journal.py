"""The journal: what it holds, what it survives, and what a replay makes of it."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.record.journal import Journal, JournalError, call_key
from maestro_jax.registry.record.replay import Replay, ReplayError, read_calls
from maestro_jax.types import Call, Observation, Status, Usage

CALL = Call("E", "S", "how many")
QUESTION, IMAGES = "what?", (b"one", b"two")
REAL_WRITE = os.write


def observed(text: str, status: Status = Status.OK) -> Observation:
    return Observation(text, status, 0.1 + 0.2, Usage(3, 4, 1e-7))


def write(path: Path, *steps: str | tuple[str, str]) -> None:
    """A section's name, or asker and text of a call."""
    journal = Journal(str(path))
    for step in steps:
        if isinstance(step, str):
            journal.begin(step)
        else:
            journal.call(step[0], CALL, QUESTION, IMAGES, observed(step[1]))
    journal.close()


def texts(path: Path) -> list[str]:
    return [observation.text for _, observation in read_calls(str(path))]


def replayed(path: Path, asker: str, call: Call = CALL, times: int = 1, section: str = "") -> list[Observation]:
    """What a dispatcher hears from a replay; raises what it would raise."""
    journal = Journal(str(path.with_name("of_the_replay.jsonl")))
    dispatcher = Dispatcher(Replay(str(path), journal))
    if section:
        journal.begin(section)
    try:
        found: list[Observation] = []
        for ticket in range(times):
            dispatcher.submit(ticket, call, QUESTION, IMAGES, 30.0, asker)
            dispatcher.wait(30.0)
            found += [observation for _, observation in dispatcher.collect()]
            dispatcher.check()
        return found
    finally:
        dispatcher.close()
        journal.close()


# ---- what is recorded --------------------------------------------------------------------------------------


def test_calls_and_requests_are_recorded(raw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(str(path))
    dispatcher = Dispatcher(Registry(parse_registry(raw()), None, journal), journal)
    for ticket in range(2):  # the second is answered by the cache
        dispatcher.submit(ticket, Call("Echo-One", "Text_Solver", "q"), QUESTION, IMAGES, 30.0, f"member {ticket}")
        dispatcher.wait(30.0)
        dispatcher.collect()
    dispatcher.close()
    journal.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["asker"]) for line in lines] == [
        ("request", "member 0"),
        ("request", "member 0"),
        ("call", "member 0"),
        ("call", "member 1"),
    ]
    service, expert, call, again = lines
    assert (service["name"], service["text"], len(service["images"])) == ("ocr", "words of 2", 4)
    assert expert["name"] == "Echo-One" and expert["text"].startswith("echo") and expert["status"] == "OK"
    assert expert["usage"]["price"] > 0 and expert["seconds"] >= 0 and expert["at"] > 0
    assert len(expert["version"]) == 16 and len(expert["request"]) == 64
    assert call["text"] == again["text"] == expert["text"] and call["request"] == again["request"]


def test_keys_of_the_environment_are_not_written(
    raw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("MAESTRO_TEST_KEY", "canary-4711")
    journal = Journal(str(tmp_path / "journal.jsonl"))
    config = parse_registry(raw())
    dispatcher = Dispatcher(Registry(config, str(tmp_path / "cache.jsonl"), journal), journal)
    for ticket, expert in enumerate(("Echo-One", "Echo-Two", "nobody")):
        dispatcher.submit(ticket, Call(expert, "Text_Solver", "q"), QUESTION, IMAGES, 30.0)
        dispatcher.wait(30.0)
    dispatcher.close()
    journal.close()
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"echo" in written
    assert b"canary-4711" not in written and "canary-4711" not in caplog.text


def test_a_call_that_ends_late_is_recorded_as_it_was_seen(tmp_path: Path) -> None:
    class Hangs:
        async def call(self, *told: Any) -> Observation:
            return await asyncio.Future()

        async def close(self) -> None:
            pass

    path = tmp_path / "journal.jsonl"
    journal = Journal(str(path))
    dispatcher = Dispatcher(Hangs(), journal)
    dispatcher.submit(0, CALL, QUESTION, IMAGES, 0.0, "a")
    dispatcher.wait(30.0)
    [(_, seen)] = dispatcher.collect()
    dispatcher.submit(1, CALL, QUESTION, IMAGES, 30.0, "cut off by closing")
    dispatcher.close()
    journal.close()
    assert seen.status is Status.TIMEOUT
    assert replayed(path, "a") == [seen]
    assert len(texts(path)) == 1


# ---- what it survives --------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, "step 1", ("a", "one"), ("b", "two"))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert texts(path) == ["one", "two"][: max(whole[:cut].count(b"\n") - 1, 0)]
        write(path, ("c", "three"))
        assert texts(path)[-1] == "three"


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "{}",
        '{"kind": "call"}',
        '{"kind": "request", "usage": {"price": "1"}}',
        '{"kind": "section", "name": 7}',
        '{"kind": "rumour"}',
        '{"kind": "call", "asker": "a", "request": "k", "expert": "E", "skill": "S", "query": "q", "text": "x", '
        '"status": "FINE", "seconds": 0.1, "usage": {}}',
        "\udcff",
        '{"kind": "call", "text"',
    ],
)
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, line: str, caplog: Any) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, "step 1", ("a", "one"))
    with open(path, "ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    write(path, ("b", "two"))
    assert texts(path) == ["one", "two"]
    assert "journal.jsonl line 3 is damaged" in caplog.text


def short_write(descriptor: int, data: bytes) -> int:
    """The disk is full after half of it."""
    return REAL_WRITE(descriptor, data[: len(data) // 2])


def failing_write(descriptor: int, data: bytes) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(("broken", "why"), [(short_write, "No space left"), (failing_write, "Input/output error")])
def test_after_a_failed_write_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any, why: str
) -> None:
    """Also when the disk has space again: the next line would be glued to the torn one."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(str(path))
    journal.call("a", CALL, QUESTION, IMAGES, observed("one"))
    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(JournalError, match=why):
        journal.call("b", CALL, QUESTION, IMAGES, observed("torn"))
    monkeypatch.undo()
    before = path.read_bytes()
    later: list[Callable[[], object]] = [
        lambda: journal.call("c", CALL, QUESTION, IMAGES, observed("glued")),
        lambda: journal.begin("step 2"),
        journal.sync,
        journal.close,
    ]
    for method in later:
        with pytest.raises(JournalError, match=why):
            method()
    assert path.read_bytes() == before and texts(path) == ["one"]
    write(path, ("d", "two"))
    assert texts(path) == ["one", "two"]


def test_after_a_failed_sync_nothing_counts_as_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a lost page once; the next fsync would succeed."""
    journal = Journal(str(tmp_path / "journal.jsonl"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: failing_write(descriptor, b""))
    with pytest.raises(JournalError):
        journal.sync()
    monkeypatch.undo()
    with pytest.raises(JournalError):
        journal.sync()


def test_a_write_does_not_wait_for_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take seconds; the event loop writes, and with it all calls would stand still."""
    path, begun, over = tmp_path / "journal.jsonl", threading.Event(), threading.Event()
    synced: list[int] = []

    def slow(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        begun.set()
        assert over.wait(30.0)

    journal = Journal(str(path))
    journal.call("a", CALL, QUESTION, IMAGES, observed("before"))
    size = journal.size()
    monkeypatch.setattr(os, "fsync", slow)
    syncing = threading.Thread(target=journal.sync)
    writing = threading.Thread(target=journal.call, args=("b", CALL, QUESTION, IMAGES, observed("meanwhile")))
    syncing.start()
    assert begun.wait(30.0)
    writing.start()
    writing.join(5.0)
    in_time = not writing.is_alive()
    over.set()
    syncing.join(30.0)
    writing.join(30.0)
    monkeypatch.undo()
    assert in_time and synced[0] >= size and texts(path) == ["before", "meanwhile"]
    journal.close()


def test_a_sync_that_waits_for_one_that_fails_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of a lost page once: the second fsync would succeed without it."""
    begun, over, told = threading.Event(), threading.Event(), []

    def fails_once(descriptor: int) -> None:
        if not begun.is_set():
            begun.set()
            assert over.wait(30.0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sync() -> None:
        try:
            journal.sync()
        except JournalError as error:
            told.append(error)

    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.begin("step 1")
    monkeypatch.setattr(os, "fsync", fails_once)
    threads = [threading.Thread(target=sync) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30.0)
    threads[1].start()
    threads[1].join(0.1)
    over.set()
    for thread in threads:
        thread.join(30.0)
    assert len(told) == 2
    with pytest.raises(JournalError):
        journal.begin("step 2")


KILLED = """
import sys
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.registry.record.journal import Journal
from maestro_jax.types import Call, Observation, Status

class Answers:
    async def call(self, call, question, images, deadline):
        return Observation(call.query, Status.OK)
    async def close(self):
        pass

dispatcher = Dispatcher(Answers(), Journal(sys.argv[1]))
for ticket in range(10**9):
    dispatcher.submit(ticket, Call("E", "S", str(ticket)), "", (), 30.0)
    if ticket % 16 == 15:
        dispatcher.wait(30.0)
        for _, observation in dispatcher.collect():
            print(observation.text, flush=True)
"""


def test_what_was_handed_over_outlives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(100)]
        process.kill()
        seen += [line.strip() for line in process.stdout.read().split("\n")[:-1]]
    assert set(seen) <= set(texts(path)) and len(seen) >= 100


def test_lines_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    usage, key = '"usage":{"prompt_tokens":3,"completion_tokens":4,"price":1e-7}', call_key(CALL, QUESTION, IMAGES)
    path.write_text(
        '{"kind":"section","name":"step 1"}\n{"kind":"section","name":"before","alone":true}\n'
        f'{{"kind":"request","asker":"a","name":"E","version":"v","request":"k","text":"x","status":"OK",'
        f'"seconds":0.1,{usage},"at":1.5e9}}\n'
        f'{{"kind":"request","asker":"a","name":"ocr","version":"v","request":"k","text":"x","status":"OK",'
        f'"seconds":0.1,{usage},"images":["k"],"at":1.5e9}}\n'
        f'{{"kind":"call","asker":"a","request":"{key}","expert":"E","skill":"S","query":"how many","text":"one",'
        f'"status":"OK","seconds":0.30000000000000004,{usage}}}\n'
        f'{{"kind": "call", "asker": "a", "request": "{key}", "expert": "E", "skill": "S", "query": "how many", '
        f'"text": "\\ud800", "status": "TIMEOUT", "seconds": 0, {usage}}}\n'
        '{"kind":"void","askers":["nobody"]}\n'
    )
    half = Observation("\ud800", Status.TIMEOUT, 0.0, Usage(3, 4, 1e-7))
    assert replayed(path, "a", times=2, section="before") == [observed("one"), half]
    journal = Journal(str(path))
    assert journal.spent() == (1, Usage(3, 4, 1e-7))  # services cost nothing
    journal.close()


def test_a_section_that_begins_again_replaces_itself_and_what_followed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lost = "step 2", ("a", "lost"), "step 3", ("a", "lost too")
    write(path, "before", ("a", "0"), "step 1", ("a", "1"), *lost)
    write(path, "step 2", ("a", "2"), "step 3", ("a", "3"))
    assert texts(path) == ["0", "1", "2", "3"]


def test_a_request_that_cannot_be_written_ends_the_run(
    raw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised within a stage, among the tasks of others."""

    def full(*args: object) -> None:
        raise JournalError("the disk is full")

    monkeypatch.setattr(Journal, "request", full)
    journal = Journal(str(tmp_path / "journal.jsonl"))
    dispatcher = Dispatcher(Registry(parse_registry(raw()), journal=journal), journal)
    dispatcher.submit(1, Call("Echo-One", "Text_Solver", "q"), QUESTION, IMAGES, 30.0)
    assert dispatcher.wait(30.0)
    with pytest.raises(JournalError, match="full"):
        dispatcher.check()
    dispatcher.close()
    journal.close()


def test_a_journal_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    class Answers:
        async def call(self, *told: Any) -> Observation:
            return observed("fine")

        async def close(self) -> None:
            pass

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(JournalError, match=r"/dev/full cannot be written \(No space left on device\); free"):
        Journal(str(full)).begin("step 1")
    dispatcher = Dispatcher(Answers(), Journal(str(full)))
    dispatcher.submit(0, CALL, QUESTION, IMAGES, 30.0)
    dispatcher.wait(30.0)
    assert [observation.status for _, observation in dispatcher.collect()] == [Status.OK]
    with pytest.raises(JournalError):
        dispatcher.check()
    dispatcher.close()


# ---- replay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", list(Status))
def test_an_observation_comes_back_bit_for_bit(tmp_path: Path, status: Status) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(str(path))
    seen = Observation("</answer>\ud800\x00é", status, 0.1 + 0.2, Usage(3, 4, 1e-7))
    journal.call("a", CALL, QUESTION, IMAGES, seen)
    journal.close()
    assert replayed(path, "a") == [seen]


def test_each_asker_gets_its_own_and_a_repeated_one_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, ("a", "a1"), ("b", "b1"), ("a", "a2"))
    assert [found.text for found in replayed(path, "b")] == ["b1"]
    assert [found.text for found in replayed(path, "a", times=2)] == ["a1", "a2"]


def test_a_replay_that_goes_on_at_a_step_is_served_its_calls(tmp_path: Path) -> None:
    """The process that made the calls of step 1 is gone: the first one of this process is of step 2."""
    path = tmp_path / "journal.jsonl"
    write(path, "step 1", ("a", "of step 1"), "step 2", ("a", "of step 2"), ("a", "again"), "step 3", ("b", "other"))
    assert [found.text for found in replayed(path, "a", times=2, section="step 2")] == ["of step 2", "again"]
    assert [found.text for found in replayed(path, "a", section="step 1")] == ["of step 1"]
    with pytest.raises(ReplayError, match="asked less often.*in 'step 2'"):
        replayed(path, "a", times=3, section="step 2")
    with pytest.raises(ReplayError, match="has no such call.*in 'step 3'"):
        replayed(path, "a", section="step 3")


@pytest.mark.parametrize("name", ["journal.jsonl", "same.jsonl"])
def test_a_journal_is_not_replayed_into_itself(tmp_path: Path, name: str) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, "step 1", ("a", "one"))
    (tmp_path / "same.jsonl").symlink_to(path)
    journal = Journal(str(path))
    with pytest.raises(ConfigError, match=rf"{name} is what this run itself writes to .*another directory"):
        Replay(str(tmp_path / name), journal)
    journal.close()
    assert texts(path) == ["one"]


def test_another_call_is_an_error_not_a_question_to_anybody(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, ("a", "one"))
    with pytest.raises(ReplayError, match="asked something else: E with S, query 'how few', asked by a in ''; replay"):
        replayed(path, "a", Call("E", "S", "how few"))
    with pytest.raises(ReplayError, match="asked less often"):
        replayed(path, "a", times=2)
    with pytest.raises(ReplayError, match="has no such call"):
        replayed(path, "z")


def test_what_is_no_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be replayed \(No such file"):
        replayed(tmp_path / "nothing", "a")
    with pytest.raises(ConfigError, match="holds no calls"):
        replayed(tmp_path / "empty", "a")
