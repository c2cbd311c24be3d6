"""Scripted episodes: how long every turn is, and how long the expert takes over every call.

In: the shape of a load and a seed. Out: a trace, the same for every side, and the seconds that no scheduler goes below.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_P99 = 2.3263478740408408  # of the standard normal distribution

# Tasks and calls are named by a mark and digits, so that a prompt tells where in its script an episode stands.
NAME_MARK = "#"
NAME_LENGTH = 5  # digits
FIRST_TASK = 90_000  # numbers from here on are tasks, those below are calls

OPENING, _FILLER = "1", " the"  # of every turn; both are one token


@dataclasses.dataclass(frozen=True)
class Latency:
    """Log-normal seconds of an expert's reply."""

    mean: float
    p99: float

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Float64 `[count]`."""
        # mean = exp(mu + sigma² / 2) and p99 = exp(mu + z sigma), so sigma² / 2 - z sigma + log(p99 / mean) = 0.
        sigma = _P99 - math.sqrt(_P99**2 - 2 * math.log(self.p99 / self.mean))
        return rng.lognormal(math.log(self.mean) - sigma**2 / 2, sigma, count)


@dataclasses.dataclass(frozen=True)
class Load:
    """What traces are drawn from."""

    groups: int
    members: int
    calls: tuple[float, ...]  # probabilities of 1, 2, ... calls
    turn_tokens: tuple[int, int]  # least and most tokens of a turn, uniform
    latency: Latency


@dataclasses.dataclass(frozen=True)
class Episode:
    """One trajectory: a call ends every turn but the last, which answers."""

    turns: tuple[int, ...]  # tokens
    calls: tuple[int, ...]  # numbers, unique in the trace
    latencies: tuple[float, ...]  # seconds, of each call

    def seconds(self, step_seconds: float) -> float:
        """How long the episode takes where it waits for nothing but its own tokens and its experts."""
        return sum(self.turns) * step_seconds + sum(self.latencies)


@dataclasses.dataclass(frozen=True)
class Trace:
    """Scripted groups of episodes."""

    seed: int
    groups: tuple[tuple[Episode, ...], ...]

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Trace":
        """The trace whose `dataclasses.asdict` has been through JSON."""
        return Trace(fields["seed"], tuple(tuple(Episode(**episode) for episode in g) for g in fields["groups"]))

    @property
    def episodes(self) -> list[Episode]:
        """All of them, group by group."""
        return [episode for group in self.groups for episode in group]

    @property
    def tokens(self) -> int:
        return sum(sum(episode.turns) for episode in self.episodes)

    @property
    def latencies(self) -> dict[int, float]:
        """Seconds by number of the call."""
        return {n: s for e in self.episodes for n, s in zip(e.calls, e.latencies, strict=True)}

    def bound(self, step_seconds: float, lanes: int) -> float:
        """Seconds that no scheduler goes below: all tokens over all lanes, or the longest single episode."""
        return max(self.tokens * step_seconds / lanes, *(episode.seconds(step_seconds) for episode in self.episodes))


def draw_trace(load: Load, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    groups, first = [], 0
    for _ in range(load.groups):
        group = []
        for _ in range(load.members):
            count = 1 + int(rng.choice(len(load.calls), p=load.calls))
            turns = rng.integers(load.turn_tokens[0], load.turn_tokens[1], count + 1, endpoint=True)
            latencies = load.latency.draw(rng, count)
            numbers = tuple(range(first, first + count))
            group.append(Episode(tuple(turns.tolist()), numbers, tuple(latencies.tolist())))
            first += count
        groups.append(tuple(group))
    if first > FIRST_TASK:
        raise ValueError(f"{first} calls need more than the {FIRST_TASK} numbers of calls; draw fewer groups")
    return Trace(seed, tuple(groups))


def call_name(number: int) -> str:
    """How a call is written in turns and requests."""
    return f"{NAME_MARK}{number:0{NAME_LENGTH}d}"


def task_name(group: int) -> str:
    """How the task of a group is written in its question."""
    return call_name(FIRST_TASK + group)


def write_turn(encode: Callable[[str], list[int]], ending: str, tokens: int) -> list[int]:
    """Ids of a turn of so many tokens: filler and the ending, which holds the call or the answer.

    Raises:
      ValueError: the ending alone is longer.
    """
    opening, filler, end = encode(OPENING), encode(_FILLER), encode(ending)
    missing = tokens - len(opening) - len(end)
    if missing < 0:
        raise ValueError(f"a turn of {tokens} tokens cannot end with {ending!r}, {len(end)} tokens; draw longer turns")
    return [*opening, *filler * missing, *end]


def latency_table(trace: Trace) -> dict[str, float]:
    """What the expert server replays: seconds by name of the call."""
    return {call_name(number): seconds for number, seconds in trace.latencies.items()}


def totals(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Of each trace: calls, tokens, mean and longest latency."""
    drawn = [list(trace.latencies.values()) for trace in traces]
    return {
        "calls": [len(seconds) for seconds in drawn],
        "tokens": [trace.tokens for trace in traces],
        "latency_mean": [float(np.mean(seconds)) for seconds in drawn],
        "latency_most": [max(seconds) for seconds in drawn],
    }
