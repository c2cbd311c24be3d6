"""The reply cache: what counts as the same request, joining requests in flight, the file."""

import asyncio
import hashlib
import json
import logging
import pathlib
import tracemalloc
from collections.abc import Coroutine
from typing import Any

import pytest

from maestro_jax.registry.description.interface import Message, Reply, Request, Sampling, ServiceResult
from maestro_jax.registry.description.keys import content_key, image_digest, request_key
from maestro_jax.registry.record.cache import Kept, ReplyCache
from maestro_jax.types import Status, Usage

LATE = Reply("", Status.TIMEOUT)
GOOD = Reply("42", Status.OK, Usage(3, 1, 5e-6), 0.25)
PICTURE = ServiceResult("a box", (b"\x89PNG\x00\xff", b""), Status.OK, 0.5)


class Source:
    """An expert under the test's control: every ask waits for `gate` and then gives the next reply."""

    def __init__(self, *replies: Reply | ServiceResult):
        self.replies = list(replies)
        self.gate = asyncio.Event()
        self.asked = 0

    async def ask(self, seconds: float) -> Any:
        self.asked += 1
        await self.gate.wait()
        return self.replies.pop(0)


async def settle() -> None:
    """Lets every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def message(text: str, *images: bytes) -> Request:
    return Request((Message("user", text, images),))


def test_key_holds_everything_but_the_deadline() -> None:
    asked = message("q", b"img")
    variants = [
        request_key("a", asked),
        request_key("b", asked),
        request_key("a", message("q2", b"img")),
        request_key("a", message("q", b"other")),
        request_key("a", message("q", b"im", b"g")),
        request_key("a", message("q")),
        request_key("a", Request(asked.messages * 2)),
        request_key("a", Request(asked.messages, Sampling(max_tokens=5))),
    ]
    assert len(set(variants)) == len(variants)
    assert request_key("a", Request(asked.messages, deadline=1.0)) == variants[0]


def test_key_parts_do_not_run_into_each_other() -> None:
    assert content_key(["ab", "c"]) != content_key(["a", "bc"])
    assert content_key(["a"]) != content_key([b"a"])


def test_key_takes_text_that_utf8_refuses() -> None:
    content_key(["\ud800"])


def test_second_ask_is_served_from_memory_with_the_first_ones_usage() -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(), Source(GOOD)
        source.gate.set()
        first = await cache.fetch("k", source.ask, 5.0, LATE)
        second = await cache.fetch("k", source.ask, 5.0, LATE)
        assert first == second == GOOD and source.asked == 1

    run(scenario())


def test_members_asking_at_once_share_one_request() -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(), Source(GOOD)
        tasks = [asyncio.create_task(cache.fetch("k", source.ask, 5.0, LATE)) for _ in range(8)]
        await settle()
        source.gate.set()
        assert await asyncio.gather(*tasks) == [GOOD] * 8
        assert source.asked == 1

    run(scenario())


def test_a_failure_is_shared_but_not_kept() -> None:
    async def scenario() -> None:
        down = Reply("", Status.UNAVAILABLE)
        cache, source = ReplyCache(), Source(down, GOOD)
        tasks = [asyncio.create_task(cache.fetch("k", source.ask, 5.0, LATE)) for _ in range(3)]
        await settle()
        source.gate.set()
        assert await asyncio.gather(*tasks) == [down] * 3 and source.asked == 1
        assert await cache.fetch("k", source.ask, 5.0, LATE) == GOOD

    run(scenario())


def test_a_follower_keeps_its_own_shorter_deadline() -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(), Source(GOOD)
        leader = asyncio.create_task(cache.fetch("k", source.ask, 5.0, LATE))
        await settle()
        assert await cache.fetch("k", source.ask, 0.01, LATE) == LATE
        source.gate.set()
        assert await leader == GOOD

    run(scenario())


def test_a_follower_outlives_the_leaders_timeout() -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(), Source(LATE, GOOD)
        tasks = [asyncio.create_task(cache.fetch("k", source.ask, s, LATE)) for s in (5.0, 50.0)]
        await settle()
        source.gate.set()
        assert await asyncio.gather(*tasks) == [LATE, GOOD] and source.asked == 2

    run(scenario())


def test_a_cancelled_leader_does_not_cancel_its_followers() -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(), Source(GOOD)
        leader, follower = (asyncio.create_task(cache.fetch("k", source.ask, 5.0, LATE)) for _ in range(2))
        await settle()
        leader.cancel()
        await settle()
        source.gate.set()
        assert await follower == GOOD

    run(scenario())


def test_those_who_joined_a_request_that_came_to_nothing_ask_again() -> None:
    async def scenario() -> None:
        cache, source, gate = ReplyCache(), Source(GOOD), asyncio.Event()
        source.gate.set()

        async def fail(seconds: float) -> Reply:
            await gate.wait()
            raise RuntimeError("the journal is full, say")

        leader = asyncio.create_task(cache.fetch("k", fail, 5.0, LATE))
        await settle()
        followers = [asyncio.create_task(cache.fetch("k", source.ask, 5.0, LATE)) for _ in range(3)]
        await settle()
        gate.set()
        assert await asyncio.gather(*followers) == [GOOD] * 3 and source.asked == 1
        with pytest.raises(RuntimeError):
            await leader

    run(scenario())


def test_nobody_is_asked_when_no_time_is_left() -> None:
    async def scenario() -> None:
        source = Source(GOOD)
        assert await ReplyCache().fetch("k", source.ask, 0.0, LATE) == LATE and source.asked == 0

    run(scenario())


# ---- how much is kept ----------------------------------------------------------------------------------------


async def keep(cache: ReplyCache, *keys: str, text: str = "x" * 1000) -> list[str]:
    """Asks for the keys; those that had to be asked for, since they were not kept."""
    asked: list[str] = []

    async def ask(key: str) -> Reply:
        asked.append(key)
        return Reply(text, Status.OK)

    for key in keys:
        await cache.fetch(key, lambda seconds, key=key: ask(key), 5.0, LATE)  # type: ignore[misc]
    return asked


def test_what_was_not_asked_for_longest_is_forgotten() -> None:
    async def scenario() -> None:
        cache = ReplyCache(most_bytes=6000)  # three replies of 1000 characters
        assert await keep(cache, "a", "b", "c", "a", "d") == ["a", "b", "c", "d"]
        assert len(cache) == 3
        assert await keep(cache, "a", "c", "d", "b") == ["b"]

    run(scenario())


def test_images_count_and_what_fits_in_no_way_is_not_kept() -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(most_bytes=6000), Source(ServiceResult("", (b"x" * 7000,)))
        source.gate.set()
        await cache.fetch("k", source.ask, 5.0, LATE)
        assert len(cache) == 0
        assert await keep(cache, "a", "a") == ["a"]

    run(scenario())


def test_of_a_file_the_latest_that_fit_are_read(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "replies.jsonl")

    async def scenario() -> None:
        cache = ReplyCache(path)
        await keep(cache, *"abcdefg")
        cache.close()
        again = ReplyCache(path, most_bytes=6000)
        assert await keep(again, *"efg", *"ab") == ["a", "b"]
        again.close()

    run(scenario())


def test_kept_replies_take_no_more_memory_than_they_are_counted_for() -> None:
    def make(number: int) -> tuple[str, Reply]:
        usage, text = Usage(number + 1000, number + 2000, number / 3), "x" * 400 + str(number)
        return hashlib.sha256(str(number).encode()).hexdigest(), Reply(text, Status.OK, usage, number / 7)

    kept = Kept(2**20)
    tracemalloc.start()
    try:
        for number in range(3000):
            kept.put(*make(number))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) < 3000 and 0.5 * 2**20 < used < 1.1 * 2**20


def test_a_file_is_as_long_as_it_may_be_and_a_start_makes_it_shorter(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures of services are megabytes each; a run of weeks would fill a disk with them."""
    path = tmp_path / "replies.jsonl"

    def live(*keys: str) -> list[str]:
        cache = ReplyCache(str(path), most_bytes=6000, most_file_bytes=8000)
        try:
            return asyncio.run(keep(cache, *keys))
        finally:
            cache.close()

    assert live(*"abcdefg") == list("abcdefg")
    assert 7000 < path.stat().st_size <= 8000 and "full until the next start" not in caplog.text
    assert live("e", "h") == ["h"]  # three fit into memory, and stay
    assert 4000 < path.stat().st_size < 5000
    assert live(*"ijklm") == list("ijklm") and path.stat().st_size <= 8000
    assert caplog.text.count("full until the next start") == 1


def test_a_file_that_cannot_be_made_shorter_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "replies.jsonl"
    fill_file(path)

    def refuse(*told: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr("maestro_jax.registry.record.cache.os.replace", refuse)
    ReplyCache(str(path), most_file_bytes=10).close()
    assert path.read_bytes() == before and "cannot be made smaller (No space left" in caplog.text


def test_lines_of_earlier_versions_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(
        '{"key":"reply","text":"42","seconds":0.25,"usage":{"prompt_tokens":3,"completion_tokens":1,"price":5e-6}}\n'
        '{"key":"service","text":"a box","seconds":0.5,"images":["iVBORwD/",""]}\n'
        '{"key": "half", "text": "\\ud800", "seconds": 1, "usage": {"prompt_tokens": 3, "completion_tokens": 1, '
        '"price": 0.0}}\n'
    )
    assert kept(path, "reply") == GOOD and kept(path, "service") == PICTURE
    assert kept(path, "half") == Reply("\ud800", Status.OK, Usage(3, 1), 1.0)


def fill_file(path: pathlib.Path) -> None:
    async def scenario() -> None:
        cache = ReplyCache(str(path))
        for key, result in (("reply", GOOD), ("service", PICTURE)):
            source = Source(result)
            source.gate.set()
            await cache.fetch(key, source.ask, 5.0, LATE)
        cache.close()

    run(scenario())


def kept(path: pathlib.Path, key: str) -> Any:
    """What a new cache on `path` has under `key`; LATE if it has nothing."""

    async def scenario() -> Any:
        cache = ReplyCache(str(path))
        source = Source(LATE)
        source.gate.set()
        found = await cache.fetch(key, source.ask, 5.0, LATE)
        cache.close()
        return found

    return asyncio.run(scenario())


def test_replies_and_images_survive_a_restart(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "deep" / "replies.jsonl"
    fill_file(path)
    assert kept(path, "reply") == GOOD and kept(path, "service") == PICTURE


def test_a_torn_last_line_is_ignored_in_silence(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "replies.jsonl"
    fill_file(path)
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert kept(path, "reply") == GOOD
    assert not caplog.records


def test_a_line_after_a_torn_one_is_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'{"key": "torn')
    fill_file(path)
    assert kept(path, "reply") == GOOD and kept(path, "service") == PICTURE


DAMAGED = [
    b"not json",
    b"[]",
    b'{"key": "bad"}',
    b'{"key": 1, "text": "", "seconds": 0, "images": []}',
    b'{"key": "bad", "text": "", "seconds": 0, "images": ["***"]}',
    b'{"key": "bad", "text": "", "seconds": 0, "images": [7]}',
    b'{"key": "bad", "text": "", "seconds": 0}',
    b'{"key": "bad", "text": "", "seconds": 0, "usage": 7}',
    b'{"key": "bad", "text": "", "seconds": 0, "usage": {"prompt_tokens": "3"}}',
    b'{"key": "bad", "text": "\\ud800", "seconds": "", "usage": {}}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_lines_are_skipped_with_a_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    path = tmp_path / "replies.jsonl"
    fill_file(path)
    path.write_bytes(line + b"\n" + path.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert kept(path, "reply") == GOOD
    assert "skipped 1 damaged of 3 lines" in caplog.text


def full(descriptor: int, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def short(descriptor: int, data: bytes) -> int:
    return len(data) // 2


@pytest.mark.parametrize("broken", [full, short])
def test_a_file_that_cannot_be_written_does_not_lose_the_reply(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: Any
) -> None:
    async def scenario() -> None:
        cache, source = ReplyCache(str(tmp_path / "replies.jsonl")), Source(GOOD)
        source.gate.set()
        monkeypatch.setattr("maestro_jax.registry.record.cache.os.write", broken)
        assert await cache.fetch("k", source.ask, 5.0, LATE) == GOOD
        assert len(cache) == 1

    run(scenario())
    assert "going on in memory only" in caplog.text


def test_lines_are_plain_json(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "replies.jsonl"
    fill_file(path)
    records = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert [record["text"] for record in records] == ["42", "a box"]


def test_digests_pin_no_more_images_than_fit() -> None:
    """Counted in bytes: 256 images of 2 MB would be 512 MB."""
    tracemalloc.start()
    try:
        for number in range(100):
            image_digest(number.to_bytes(2) * 2**20)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 68 * 2**20


def test_an_image_that_is_shown_again_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [bytes([number]) * 2**20 for number in range(3)]
    digests = [image_digest(image) for image in images]
    assert digests == [hashlib.sha256(image).hexdigest() for image in images]
    monkeypatch.setattr(hashlib, "sha256", lambda *told: pytest.fail("hashed again"))
    assert [image_digest(image) for image in images] == digests
