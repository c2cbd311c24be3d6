"""Demonstrations of the episode's format, written by a weak router.

The router stands for what a pretrained model brings along: it knows the format, and it follows the
descriptions of experts and skills part of the time, guessing otherwise. Descriptions may over-claim
(`claims` may point to the wrong expert), calls are made for real, and the answer is whatever came
back. So demonstrations teach how to call, not whom to call: that is left to reinforcement. A
pretrained model also sees what kind of task it has before it: the router says so in a thought, which
names the kind and no expert.

A pretrained model also knows how to quote. A tiny one has to learn it, and most replies to guessed
calls say nothing, so a share of the demonstrations rehearses: their reply is a random short text
instead of the expert's. Rehearsals say nothing about experts or tasks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from maestro_jax import failpoints
from maestro_jax.data.source import OnDemand
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import preemption
from maestro_jax.policy.tokens import Tokens
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout import protocol
from maestro_jax.rollout.exchange import Exchange
from maestro_jax.rollout.outages import Marks, Outages
from maestro_jax.types import Call, Observation, Status, Task
from maestro_jax.warm_start.config import WarmStartConfig
from maestro_jax.warm_start.demonstrations import Demonstrations, Written, as_ids

NO_HELP = "I cannot tell."
_IN_FLIGHT = 64
_QUERY = "answer the question"  # for a skill that the config has no phrases for


@dataclasses.dataclass(frozen=True)
class WeakRouter:
    """Chooses a pair for a task: the claimed expert and skill part of the time, else any."""

    registry: RegistryConfig
    config: WarmStartConfig

    def choose(self, source: str, rng: np.random.Generator) -> Call:
        experts = [expert.name for expert in self.registry.shown_experts]
        skills = [skill.name for skill in self.registry.shown_skills]
        expert, skill = experts[rng.integers(len(experts))], skills[rng.integers(len(skills))]
        if source in self.config.claims:
            claimed_expert, claimed_skill = self.config.claims[source]
            expert = claimed_expert if rng.random() < self.config.follow_expert else expert
            skill = claimed_skill if rng.random() < self.config.follow_skill else skill
        phrases = self.config.queries.get(skill, (_QUERY,))
        return Call(expert, skill, phrases[rng.integers(len(phrases))])

    def thought(self, source: str) -> str:
        """What is written before the first call; empty for sources that have no thought."""
        text = self.config.thoughts.get(source, "")
        return f"{protocol.THINK_OPEN} {text} {protocol.THINK_CLOSE}" if text else ""

    def longest_turn(self, count: Callable[[str], int], in_thought: bool = False) -> int:
        """Most tokens that it writes before a reply, as `count` counts those of a text.

        Args:
          in_thought: as of `parse_turn`.
        """
        calls = [
            call_text(Call(expert.name, skill.name, phrase))
            for expert in self.registry.shown_experts
            for skill in self.registry.shown_skills
            for phrase in self.config.queries.get(skill.name, (_QUERY,))
        ]
        thoughts = [self.thought(source) for source in self.config.thoughts] or [""]
        begin = protocol.inside_thought if in_thought else str
        return max(count(begin(thought)) for thought in thoughts) + max(map(count, calls))

    def texts(self) -> list[str]:
        """Everything the router can write before an answer, for the tokenizer's training."""
        return [self.thought(source) for source in self.config.thoughts] + [
            call_text(Call(expert.name, skill.name, phrase))
            for expert in self.registry.shown_experts
            for skill in self.registry.shown_skills
            for phrase in self.config.queries.get(skill.name, ())
        ]


def call_text(call: Call) -> str:
    return f"{protocol.CALL_OPEN} {call.expert}@@{call.skill}: {call.query} {protocol.CALL_CLOSE}"


def answer_text(answer: str) -> str:
    return f"{protocol.ANSWER_OPEN} {answer} {protocol.ANSWER_CLOSE}"


def make_calls(
    dispatcher: Dispatcher,
    calls: Sequence[tuple[Task, Call]],
    deadline: float,
    tick: Callable[[int], None],
    outages: Outages | None = None,
) -> list[Observation]:
    """Runs calls side by side and returns their observations in order; `tick` hears how many are back.

    Only so many are in flight at a time: a deadline counts from the submission, queueing included.

    Args:
      outages: has calls that failed made again, and refuses the whole where too many are left; None leaves them.

    Raises:
      UserError: a call ended with it (`Dispatcher.check`), or it is the set-up that experts refuse.
      Preempted: experts did not come back in time.
    """
    found: dict[int, Observation] = {}

    def ask(tickets: Sequence[int]) -> None:
        waiting, left = set[int](), list(reversed(tickets))
        while waiting or left:
            while left and len(waiting) < _IN_FLIGHT:
                task, call = calls[left[-1]]
                waiting.add(left[-1])
                dispatcher.submit(left.pop(), call, task.question, task.images, deadline)
            failpoints.reach("in_baselines")
            preemption.check()
            dispatcher.wait(1.0)
            for ticket, observation in dispatcher.collect():
                waiting.discard(ticket)
                found[ticket] = observation
            dispatcher.check()
            tick(len(found))

    def again() -> None:
        failed = sorted(ticket for ticket, seen in found.items() if seen.status.is_infrastructure)
        dispatcher.void([f"ticket {ticket}" for ticket in failed])
        ask(failed)

    ask(range(len(calls)))
    if outages is not None:
        asked = f"{len(calls)} calls"
        outages.check(outages.insist(lambda: marks_of_calls(calls, found), again, asked), "calls")
    return [found[ticket] for ticket in range(len(calls))]


def marks_of_calls(calls: Sequence[tuple[Task, Call]], found: Mapping[int, Observation]) -> Marks:
    """Of calls that have ended; reads those that failed."""
    failed = {ticket: seen.status for ticket, seen in found.items() if seen.status.is_infrastructure}
    return Marks.of(
        (ticket in failed, [(calls[ticket][1].expert, failed[ticket])] if ticket in failed else [])
        for ticket in range(len(calls))
    )


def write_demonstrations(
    tasks: Sequence[Task],
    router: WeakRouter,
    exchange: Exchange,
    seed: int,
    progress: Progress,
    outages: Outages | None = None,
) -> Demonstrations:
    """One demonstration per entry of `tasks` (a task may stand there several times); process 0 writes for all.

    Args:
      tasks: read again whenever a demonstration is asked for.
      exchange: runs the calls and renders observations exactly as in a rollout.
      progress: told about every answered call; how many there are depends on the draws in here.
      outages: as of `make_calls`. What is left without an answer then is a rehearsal.
    """

    return Demonstrations(tasks, lambda: _write_all(tasks, router, exchange, seed, progress, outages))


def _write_all(
    tasks: Sequence[Task],
    router: WeakRouter,
    exchange: Exchange,
    seed: int,
    progress: Progress,
    outages: Outages | None,
) -> Iterator[Written]:
    rng, rng_of_lost = np.random.default_rng(seed), np.random.default_rng([seed, 1])

    def answers(asked: Sequence[tuple[int, Call]]) -> Iterator[Observation]:
        calls = OnDemand(range(len(asked)), lambda n: (tasks[asked[n][0]], asked[n][1]))
        for reply in make_calls(exchange.dispatcher, calls, exchange.config.deadline, progress.tick, outages):
            is_lost = outages is not None and reply.status.is_infrastructure
            yield Observation(random_text(words, pieces, rng_of_lost), Status.OK) if is_lost else reply

    words = [str(answer) for task in tasks for answer in task.answers[:1]] or ["answer"]
    pieces = letter_pieces(exchange.tokens)
    first = [router.choose(task.source, rng) for task in tasks]
    rehearsed = rng.random(len(tasks)) < router.config.rehearsal
    real = [(number, call) for number, call in enumerate(first) if not rehearsed[number]]
    progress.phase("demonstrations", len(real))
    answered = answers(real)
    replies = [
        Observation(random_text(words, pieces, rng), Status.OK) if skip else next(answered) for skip in rehearsed
    ]
    may_repeat = exchange.config.max_calls > 1
    wants_more = [
        may_repeat and reply.text == NO_HELP and rng.random() < router.config.second_call for reply in replies
    ]
    second = [router.choose(task.source, rng) if more else None for task, more in zip(tasks, wants_more, strict=True)]
    again = [(number, call) for number, call in enumerate(second) if call is not None]
    if again:
        progress.phase("demonstrations, second calls", len(again))
    later = answers(again)
    for task, call, reply, other in zip(tasks, first, replies, second, strict=True):
        steps = [(call, reply)] if other is None else [(call, reply), (other, next(later))]
        yield _write(router.thought(task.source), steps, exchange)


def random_text(words: Sequence[str], pieces: Sequence[str], rng: np.random.Generator) -> str:
    """One or two words in a row: of the training answers, numbers, or made up of pieces of the vocabulary.

    Longer than real replies: every token of it is one more to learn quoting from.
    """
    return " ".join(_random_word(words, pieces, rng) for _ in range(rng.integers(1, 3)))


def _random_word(words: Sequence[str], pieces: Sequence[str], rng: np.random.Generator) -> str:
    kind = rng.integers(4)
    if kind == 0:
        return words[int(rng.integers(len(words)))]
    if kind == 1:
        return str(round(float(10 ** rng.uniform(0, 4)), int(rng.integers(3))))
    return "".join(pieces[int(i)] for i in rng.integers(len(pieces), size=rng.integers(1, 5))).strip()


def letter_pieces(tokens: Tokens) -> list[str]:
    """Every token of letters, some with a leading space: one never quoted in a rehearsal is not quoted later."""
    texts = (raw.decode("ascii", "ignore") for raw in tokens.token_bytes(tokens.size))
    return [text for text in texts if text.strip().isalpha()]


def _write(thought: str, steps: Sequence[tuple[Call, Observation]], exchange: Exchange) -> Written:
    """A thought, calls with what came back, and an answer that quotes the last reply as far as it was shown."""
    tokens = exchange.tokens
    begin = protocol.inside_thought if exchange.in_thought else str
    unspoken = tokens.encode(begin(""))  # before every later turn
    pieces: list[tuple[Sequence[int], bool]] = [(tokens.encode(begin(thought)), True)]
    for number, (call, observation) in enumerate(steps, start=1):
        if number > 1:
            pieces.append((unspoken, True))
        pieces.append((tokens.encode(call_text(call)), True))
        pieces.append((exchange.observation_ids(observation, number >= exchange.config.max_calls), False))
    opening, closing = tokens.encode(protocol.ANSWER_OPEN), tokens.encode(f" {protocol.ANSWER_CLOSE}")
    pieces.append(([*unspoken, *opening, *exchange.body_ids(steps[-1][1].text), *closing], True))
    return as_ids(pieces)


def tokenizer_texts(system: str, tasks: Sequence[Task], router: WeakRouter, frames: Sequence[str]) -> list[str]:
    """What the tiny tokenizer is trained on: prompts, calls, observation frames and training answers.

    Args:
      frames: text that stands in every episode; it should cost few tokens.
    """
    texts = [system] * max(1, len(tasks) // 20) + router.texts() * 20 + [*frames, NO_HELP] * len(tasks)
    for task in tasks:
        texts += [task.question, *(answer_text(answer) for answer in task.answers[:1])]
    return texts
