"""Demonstrations of the episode's format, written by a weak router.

The router stands for what a pretrained model brings along: it knows the format, and it follows the
descriptions of experts and skills part of the time, guessing otherwise. Descriptions may over-claim
(`claims` may point to the wrong expert), calls are made for real, and the answer is whatever came
back. So demonstrations teach how to call, not whom to call: that is left to reinforcement.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from maestro_jax.config import WarmStartConfig
from maestro_jax.policy.tokens import Tokens
from maestro_jax.registry.config import RegistryConfig
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout import protocol
from maestro_jax.types import Call, Observation, Task

NO_HELP = "I cannot tell."


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One written episode: token ids and which of them a policy would have authored."""

    task: Task
    ids: tuple[int, ...]
    authored: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class WeakRouter:
    """Chooses a pair for a task: the claimed expert and skill part of the time, else any."""

    registry: RegistryConfig
    config: WarmStartConfig

    def choose(self, source: str, rng: np.random.Generator) -> Call:
        experts = [expert.name for expert in self.registry.experts]
        skills = [skill.name for skill in self.registry.shown_skills]
        expert, skill = experts[rng.integers(len(experts))], skills[rng.integers(len(skills))]
        if source in self.config.claims:
            claimed_expert, claimed_skill = self.config.claims[source]
            expert = claimed_expert if rng.random() < self.config.follow_expert else expert
            skill = claimed_skill if rng.random() < self.config.follow_skill else skill
        phrases = self.config.queries.get(skill, ("answer the question",))
        return Call(expert, skill, phrases[rng.integers(len(phrases))])

    def texts(self) -> list[str]:
        """Every call the router can write, for the tokenizer's training."""
        return [
            call_text(Call(expert.name, skill.name, phrase))
            for expert in self.registry.experts
            for skill in self.registry.shown_skills
            for phrase in self.config.queries.get(skill.name, ())
        ]


def call_text(call: Call) -> str:
    return f"{protocol.CALL_OPEN} {call.expert}@@{call.skill}: {call.query} {protocol.CALL_CLOSE}"


def answer_text(answer: str) -> str:
    return f"{protocol.ANSWER_OPEN} {answer} {protocol.ANSWER_CLOSE}"


def make_calls(
    dispatcher: Dispatcher, calls: Sequence[tuple[Task, Call]], deadline: float, tick: Callable[[int], None]
) -> list[Observation]:
    """Runs calls side by side and returns their observations in order; `tick` hears how many are back."""
    for ticket, (task, call) in enumerate(calls):
        dispatcher.submit(ticket, call, task.question, task.images, deadline)
    found: dict[int, Observation] = {}
    while len(found) < len(calls):
        dispatcher.wait(1.0)
        found.update(dispatcher.collect())
        tick(len(found))
    return [found[ticket] for ticket in range(len(calls))]


def write_demonstrations(
    tasks: Sequence[Task],
    router: WeakRouter,
    dispatcher: Dispatcher,
    deadline: float,
    tokens: Tokens,
    observation_ids: Callable[[Observation, bool], list[int]],
    max_calls: int,
    seed: int,
    tick: Callable[[int], None],
) -> list[Demonstration]:
    """One demonstration per entry of `tasks` (a task may stand there several times).

    Args:
      observation_ids: the exchange's rendering of an observation; its flag says no calls are left.
      tick: told how many calls have been answered.
    """
    rng = np.random.default_rng(seed)
    first = [router.choose(task.source, rng) for task in tasks]
    replies = make_calls(dispatcher, list(zip(tasks, first, strict=True)), deadline, tick)
    wants_more = [
        max_calls > 1 and reply.text == NO_HELP and rng.random() < router.config.second_call for reply in replies
    ]
    second = [router.choose(task.source, rng) if more else None for task, more in zip(tasks, wants_more, strict=True)]
    again = [(task, call) for task, call in zip(tasks, second, strict=True) if call is not None]
    later = iter(make_calls(dispatcher, again, deadline, lambda done: tick(len(tasks) + done)))
    demonstrations = []
    for task, call, reply, other in zip(tasks, first, replies, second, strict=True):
        steps = [(call, reply)] if other is None else [(call, reply), (other, next(later))]
        demonstrations.append(_write(task, steps, tokens, observation_ids, max_calls))
    return demonstrations


def _write(
    task: Task,
    steps: Sequence[tuple[Call, Observation]],
    tokens: Tokens,
    observation_ids: Callable[[Observation, bool], list[int]],
    max_calls: int,
) -> Demonstration:
    ids: list[int] = []
    authored: list[bool] = []

    def add(piece: Sequence[int], by_policy: bool) -> None:
        ids.extend(piece)
        authored.extend([by_policy] * len(piece))

    for number, (call, observation) in enumerate(steps, start=1):
        add(tokens.encode(call_text(call)), True)
        add(observation_ids(observation, number >= max_calls), False)
    said = protocol.neutralise(steps[-1][1].text, tokens.special_texts)
    add(tokens.encode_foreign(answer_text(said)), True)
    return Demonstration(task, tuple(ids), tuple(authored))


def tokenizer_texts(system: str, tasks: Sequence[Task], router: WeakRouter, frames: Sequence[str]) -> list[str]:
    """What the tiny tokenizer is trained on: prompts, calls, observation frames and training answers.

    Args:
      frames: text that stands in every episode; it should cost few tokens.
    """
    texts = [system] * max(1, len(tasks) // 20) + router.texts() * 5 + list(frames) * len(tasks)
    for task in tasks:
        texts += [task.question, *(answer_text(answer) for answer in task.answers[:1])]
    return texts
