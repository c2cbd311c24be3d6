"""A run that goes on: what was answered before it was interrupted is not asked again."""

import asyncio
from pathlib import Path

import pytest

from maestro_jax.registry.record.journal import ASKER, Journal
from maestro_jax.registry.record.replay import Resumed
from maestro_jax.types import Call, Observation, Status, Usage

CALL = Call("E", "S", "how many")
Line = str | tuple[str, str] | tuple[str, str, Status]  # a section's name, or asker, text and status of a call


class Asked:
    """A registry that notes who asks, and says so."""

    def __init__(self) -> None:
        self.askers: list[str] = []

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        self.askers.append(ASKER.get())
        return Observation("asked", Status.OK)

    async def close(self) -> None:
        pass


def write(path: Path, *lines: Line) -> int:
    """Bytes that the file has then."""
    journal = Journal(str(path))
    for line in lines:
        if isinstance(line, str):
            journal.begin(line)
        else:
            asker, text, *status = line
            seen = Observation(text, *(status or [Status.OK]), seconds=0.3, usage=Usage(3, 4, 0.1))
            journal.call(asker, CALL, "", (), seen)
    journal.close()
    return path.stat().st_size


def heard(path: Path, section: str, *askers: str, since: dict[str, int] | None = None) -> list[str]:
    """What they hear in a section of the run that goes on."""
    journal, asked = Journal(str(path)), Asked()
    resumed = Resumed(asked, journal)
    resumed.recall(since or {})
    journal.begin(section)

    async def ask() -> list[str]:
        found = []
        for asker in askers:
            ASKER.set(asker)
            found.append((await resumed.call(CALL, "", (), 30.0)).text)
        return found

    try:
        return asyncio.run(ask())
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_what_was_answered_is_not_asked_again(path: Path) -> None:
    write(path, "step 1", ("a", "one"), "step 2", ("a", "two"), ("a", "three"))
    assert heard(path, "step 2", "a", "b", "a", "a") == ["two", "asked", "three", "asked"]


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_who_failed_is_asked_again(path: Path, status: Status) -> None:
    write(path, "step 1", ("a", "no reply", status), ("b", "one"))
    assert heard(path, "step 1", "a", "b") == ["asked", "one"]


def test_what_is_trained_is_left_behind(path: Path) -> None:
    size = write(path, "step 1", ("a", "one"))
    write(path, "step 2", ("a", "two"))
    since = {path.name: size}
    assert heard(path, "step 1", "a", since=since) == ["asked"]
    assert heard(path, "step 2", "a", since=since) == ["two"]


def test_an_attempt_that_came_less_far_takes_nothing_away(path: Path) -> None:
    """The second one was served a1 and b1, and killed before it came to step 2."""
    write(path, "step 1", ("a", "a1"), ("b", "b1"), "step 2", ("a", "a2"))
    write(path, "step 1", ("a", "a1"), ("b", "b1"), ("c", "c1"))
    assert heard(path, "step 1", "a", "a", "b", "c") == ["a1", "asked", "b1", "c1"]
    assert heard(path, "step 2", "a") == ["a2"]


def test_journals_of_all_processes_are_read(path: Path) -> None:
    """A group may have been another process's."""
    write(path, "step 1", ("a", "one"))
    write(path.with_name("journal.1.jsonl"), "step 1", ("b", "two"))
    assert heard(path, "step 1", "a", "b") == ["one", "two"]
