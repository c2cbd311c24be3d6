"""Calls that are answered from a journal: those of another run, and those of this run before it was interrupted.

A call is known by the section in which it is made, by its asker and by what is asked. Equal ones get their observations
in the order in which they were recorded.
"""

import asyncio
import collections
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from maestro_jax.errors import ConfigError, UserError
from maestro_jax.registry.description.interface import CallRunner
from maestro_jax.registry.record.journal import (
    ASKER,
    CallLine,
    Journal,
    SectionLine,
    VoidLine,
    call_key,
    journals,
    read_lines,
)
from maestro_jax.types import Call, Observation, Status


class ReplayError(UserError):
    """A call that the recorded run did not make."""


class CallKey(NamedTuple):
    """What a recorded call is known by: the section, who asks, and the hash of what is asked."""

    section: str
    asker: str
    request: str


class Replay:
    """A `CallRunner` that answers from the journal of another run, at once, and asks nobody.

    A replay that goes on at step k is served the calls of step k.

    Args:
      path: the recorded run's journal; those of its other processes are beside it.
      journal: of the run that is served; it tells the section.

    Raises:
      ConfigError: the file cannot be read, holds no calls, or is the journal of the run that is served.
    """

    def __init__(self, path: str, journal: Journal):
        self._path, self._journal = path, journal
        self._recorded: dict[CallKey, collections.deque[Observation]] = collections.defaultdict(collections.deque)
        try:
            recorded = journals_of(path)
            if any(os.path.samefile(one, journal.path) for one in recorded):
                cure = "use another directory, or go on without --replay"
                raise ConfigError(f"{path} is what this run itself writes to and cannot be replayed into it; {cure}")
            for one in recorded:
                for key, observation in read_calls(one):
                    self._recorded[key].append(observation)
        except OSError as error:
            reason = error.strerror
            raise ConfigError(f"{path} cannot be replayed ({reason}); name the journal.jsonl of a run") from error
        if not self._recorded:
            raise ConfigError(f"{path} holds no calls; name the journal.jsonl of a run that made some")

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        """What was observed when this was asked.

        Raises:
          ReplayError: it was not asked by this asker in this section, or not as often.
        """
        await asyncio.sleep(0)  # a call never comes back before `submit` has
        key = CallKey(self._journal.section, ASKER.get(), call_key(call, question, images))
        found = self._recorded.get(key)
        if not found:
            known = any(other[:2] == key[:2] for other in self._recorded)
            what = "asked something else" if known and found is None else "asked less often"
            raise ReplayError(
                f"{self._path}: the recorded run {what if known else 'has no such call'}: {call.expert} with "
                f"{call.skill}, query {call.query[:40]!r}, asked by {key.asker} in {key.section!r}; replay with the "
                "recorded run's config, data and code"
            )
        return found.popleft()

    def shunned(self) -> dict[str, str]:
        return {}  # nobody is asked

    async def close(self) -> None:
        pass


def journals_of(path: str) -> list[str]:
    """A run's journals: this one, and "journal.1.jsonl" and so on of its other processes."""
    first = Path(path)
    return [path, *sorted(map(str, first.parent.glob(f"{first.stem}.*{first.suffix}")))]


def read_calls(path: str) -> Iterator[tuple[CallKey, Observation]]:
    """Every call that counts with what was observed, in the order of the file.

    Raises:
      OSError: the file cannot be read.
    """
    sections: dict[str, list[tuple[CallKey, Observation]]] = {"": []}  # in the order in which they first began
    section = ""
    for line in read_lines(path):
        if isinstance(line, SectionLine):
            section, names = line.name, list(sections)
            if section in sections and not line.alone:
                for later in names[names.index(section) :]:
                    del sections[later]
            sections[section] = []
        elif isinstance(line, CallLine):
            sections[section].append((CallKey(section, line.asker, line.request), line.observation))
        elif isinstance(line, VoidLine):
            calls = sections[section]
            for asker in line.askers:
                if (last := next((i for i in reversed(range(len(calls))) if calls[i][0].asker == asker), -1)) >= 0:
                    del calls[last]
    for calls in sections.values():
        yield from calls


# ---- a run that was interrupted ----------------------------------------------------------------------------


class Resumed:
    """A `CallRunner` that answers what was answered before the run was interrupted, and leaves the rest to another.

    What begins again asks what it asked before: the same policy with the same keys. That has been paid for. Only good
    answers count; experts that failed are asked again.

    Args:
      runner: of the run, its registry or a replay; closed with this.
      journal: of the run; tells the section.
    """

    def __init__(self, runner: CallRunner, journal: Journal):
        self._runner, self._journal = runner, journal
        self._answered: dict[CallKey, collections.deque[Observation]] = {}

    def recall(self, since: Mapping[str, int]) -> int:
        """Reads what the run's journals, of all its processes, hold already; for the thread that begins sections.

        Args:
          since: by name of the file, bytes that lie behind what is trained; of other files, all is read.

        Returns:
          How many calls are not going to be asked again.

        Raises:
          ConfigError: a journal cannot be read.
        """
        for path in journals(self._journal.path):
            try:
                found = read_answered(str(path), since.get(path.name, 0))
            except OSError as error:
                raise ConfigError(f"{path} cannot be read ({error.strerror}); make it readable or remove it") from error
            self._answered = _longer(self._answered, found)
        return sum(map(len, self._answered.values()))

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        if self._answered:
            await asyncio.sleep(0)  # a call never comes back before `submit` has
            key = CallKey(self._journal.section, ASKER.get(), call_key(call, question, images))
            if found := self._answered.get(key):
                return found.popleft()
        return await self._runner.call(call, question, images, deadline)

    def shunned(self) -> dict[str, str]:
        return self._runner.shunned()

    async def close(self) -> None:
        await self._runner.close()


def read_answered(path: str, start: int) -> dict[CallKey, collections.deque[Observation]]:
    """Good answers from byte `start` on, whichever attempt at a section got furthest with what was asked.

    An attempt begins where a section does that the one before has begun; what it asks is what that one asked, and what
    it was served from that is recorded again.

    Raises:
      OSError: the file cannot be read.
    """
    furthest: dict[CallKey, collections.deque[Observation]] = {}
    attempt: dict[CallKey, collections.deque[Observation]] = {}
    begun: list[str] = [""]
    for line in read_lines(path, start):
        if isinstance(line, SectionLine):
            if line.name in begun:
                furthest, attempt, begun = _longer(furthest, attempt), {}, []
            begun.append(line.name)
        elif isinstance(line, CallLine) and (seen := line.observation).status is Status.OK:
            key = CallKey(begun[-1], line.asker, line.request)
            attempt.setdefault(key, collections.deque()).append(seen)
    return _longer(furthest, attempt)


def _longer(
    one: dict[CallKey, collections.deque[Observation]], other: dict[CallKey, collections.deque[Observation]]
) -> dict[CallKey, collections.deque[Observation]]:
    return one | {key: found for key, found in other.items() if len(found) > len(one.get(key, ()))}
