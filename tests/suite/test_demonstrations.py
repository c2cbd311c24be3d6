"""The weak router's habits, and demonstrations that mark exactly what a policy would have written."""

import dataclasses
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from maestro_jax.data.source import OnDemand
from maestro_jax.observe.progress import Progress
from maestro_jax.parallel import preemption
from maestro_jax.policy.tokens import Tokens
from maestro_jax.registry.description.config import RegistryConfig
from maestro_jax.rollout import outages as outages_module
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.outages import OutageConfig, Outages
from maestro_jax.rollout.protocol import parse_turn
from maestro_jax.suite.demonstrations import (
    NO_HELP,
    WeakRouter,
    answer_text,
    call_text,
    letter_pieces,
    make_calls,
    random_text,
    tokenizer_texts,
    write_demonstrations,
)
from maestro_jax.types import Call, Observation, Status, StopReason, Task
from maestro_jax.warm_start.demonstrations import Demonstration
from tests.data.listed import Fresh
from tests.policy import qwen

Make = Callable[..., WeakRouter]
DRAWS = 3000
EPISODE = EpisodeConfig(
    max_calls=2, observation_tokens=48, observation_multiple=8, deadline=1.0, turn_budget=64, room=256
)


def share(router: WeakRouter, source: str, holds: Callable[[Call], bool]) -> float:
    rng = np.random.default_rng(0)
    return sum(holds(router.choose(source, rng)) for _ in range(DRAWS)) / DRAWS


# Standard error of a share over 3000 draws is below 0.0092: four of them, at a fixed seed.
NEAR = 0.037


def test_claims_are_followed_as_often_as_configured(make_router: Make) -> None:
    """Following, or guessing it by chance (one of four experts, one of two skills); independent of each other."""
    router = make_router()
    expert, skill = 0.4 + 0.6 / 4, 0.7 + 0.3 / 2
    assert share(router, "charts", lambda c: c.expert == "Chart-Lens") == pytest.approx(expert, abs=NEAR)
    assert share(router, "charts", lambda c: c.skill == "Chart_Solver") == pytest.approx(skill, abs=NEAR)
    both = share(router, "charts", lambda c: (c.expert, c.skill) == ("Chart-Lens", "Chart_Solver"))
    assert both == pytest.approx(expert * skill, abs=NEAR)


def test_without_a_claim_every_shown_pair_is_as_likely(make_router: Make, registry: RegistryConfig) -> None:
    router, rng = make_router(), np.random.default_rng(0)
    drawn = [router.choose("unheard of", rng) for _ in range(DRAWS)]
    counts = Counter((call.expert, call.skill) for call in drawn)
    shown = itertools.product([e.name for e in registry.experts], ["Chart_Solver", "Counting_Solver"])
    assert counts.keys() == set(shown)
    assert max(abs(n / DRAWS - 1 / 8) for n in counts.values()) < NEAR


def test_queries_are_those_of_the_chosen_skill(make_router: Make) -> None:
    router, rng = make_router(), np.random.default_rng(0)
    drawn = [router.choose("charts", rng) for _ in range(200)]
    assert {c.query for c in drawn if c.skill == "Chart_Solver"} == {"read the chart", "check the axis"}
    assert {c.query for c in drawn if c.skill == "Counting_Solver"} == {"answer the question"}


# ---- calls -------------------------------------------------------------------------------------------------


def test_many_calls_come_back_in_order_with_few_in_flight(instant_experts: Any, tasks: list[Task]) -> None:
    experts, heard = instant_experts(echo, backwards=True), []
    calls = [(tasks[i % 12], Call("Tally", "Chart_Solver", f"query {i}")) for i in range(200)]
    most = 0

    def tick(done: int) -> None:
        nonlocal most
        heard.append(done)
        most = max(most, len(experts.calls) - done)

    found = make_calls(experts, calls, 1.0, tick)
    assert [one.text for one in found] == [echo(call, task.question) for task, call in calls]
    assert heard[-1] == 200 and most <= 64


def test_demonstrations_of_experts_that_stay_away_are_none(
    make_router: Make, instant_experts: Any, tokens: Tokens, tasks: list[Task]
) -> None:
    """They once quoted error messages, and a run was trained on them."""
    router = make_router()
    experts = instant_experts(echo, failing=[expert.name for expert in router.registry.experts])
    exchange, lines = Exchange(tokens, router.registry, experts, EPISODE), list[str]()
    outages = Outages(OutageConfig(0.2, 0.0), ["Chart-Lens"], lambda: {"Chart-Lens": "no connection"}, lines.append)
    with pytest.raises(preemption.Preempted) as stop:
        write_demonstrations(tasks, router, exchange, 0, Progress(io.StringIO()), outages)
    assert "100 % of 12 calls met an outage" in stop.value.reason


def test_what_always_fails_becomes_a_rehearsal(
    make_router: Make, instant_experts: Any, tokens: Tokens, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages_module, "FIRST_PAUSE", 0.0)
    experts, router = instant_experts(echo, failing=["Chart-Lens"], status=Status.TIMEOUT), make_router()
    exchange = Exchange(tokens, router.registry, experts, dataclasses.replace(EPISODE, max_calls=1))
    outages = Outages(OutageConfig(0.99, 60.0), ["Chart-Lens"], dict, lambda line: None)
    written = write_demonstrations(tasks, router, exchange, 0, Progress(io.StringIO()), outages)
    first = [call for call, _ in experts.calls[: len(tasks)]]
    assert {call.expert for call in first} > {"Chart-Lens"}
    for one, call in zip(written, first, strict=True):
        (by_policy, answer), none = pieces(one)[-1], tokens.encode(answer_text(NO_HELP))
        assert by_policy and answer != none
        if call.expert != "Chart-Lens":
            assert answer == tokens.encode(answer_text(echo(call, one.task.question)))


# ---- demonstrations ----------------------------------------------------------------------------------------


@pytest.fixture
def write(make_router: Make, instant_experts: Any, tokens: Tokens, tasks: list[Task]) -> Callable[..., Any]:
    """Writes demonstrations of all tasks; returns them with the experts and the exchange."""

    def run(
        reply: Callable[[Call, str], str], seed: int = 0, backwards: bool = False, max_calls: int = 2, **settings: Any
    ) -> tuple[list[Demonstration], Any, Exchange]:
        experts, router = instant_experts(reply, backwards), make_router(**settings)
        exchange = Exchange(tokens, router.registry, experts, dataclasses.replace(EPISODE, max_calls=max_calls))
        written = write_demonstrations(tasks, router, exchange, seed, Progress(io.StringIO()))
        return list(written), experts, exchange

    return run


def pieces(demonstration: Demonstration) -> list[tuple[bool, list[int]]]:
    """Runs of ids with the same author."""
    pairs = zip(demonstration.authored, demonstration.ids, strict=True)
    return [(by, [i for _, i in run]) for by, run in itertools.groupby(pairs, key=lambda pair: pair[0])]


def echo(call: Call, question: str) -> str:
    return f"{call.expert} on {question}"


def test_call_and_answer_are_authored_and_the_observation_is_not(
    write: Callable[..., Any], tokens: Tokens, tasks: list[Task]
) -> None:
    written, experts, exchange = write(echo)
    assert [one.task for one in written] == tasks
    for one, (call, question) in zip(written, experts.calls, strict=True):
        observation = Observation(echo(call, question), Status.OK)
        assert pieces(one) == [
            (True, tokens.encode(call_text(call))),
            (False, exchange.observation_ids(observation, last=False)),
            (True, tokens.encode(answer_text(observation.text))),
        ]


def test_the_kind_of_task_is_thought_before_the_first_call(
    write: Callable[..., Any], make_router: Make, tokens: Tokens, tasks: list[Task]
) -> None:
    written, experts, _ = write(echo, thoughts={"charts": "a chart"})
    for one, task, (call, _) in zip(written, tasks, experts.calls, strict=True):
        thought = "<think> a chart </think>" if task.source == "charts" else ""
        assert tokens.decode(pieces(one)[0][1]) == thought + call_text(call)
        parsed = parse_turn(thought + call_text(call), StopReason.CALL, make_router().registry)
        assert parsed.well_formed and parsed.call == call


def test_every_turn_closes_the_thought_that_the_template_opens(
    make_router: Make, instant_experts: Any, tokens: Tokens, tasks: list[Task]
) -> None:
    """The first one with the router's thought in it, the others with none; no turn is longer than is said."""
    router = make_router(thoughts={"charts": "a chart"}, second_call=1.0)
    exchange = Exchange(qwen.thinking(tokens), router.registry, instant_experts(lambda *_: NO_HELP), EPISODE)
    written = write_demonstrations(tasks, router, exchange, 0, Progress(io.StringIO()))
    for one in written:
        turns = [tokens.decode(ids) for own, ids in pieces(one) if own]
        assert len(turns) == 3
        for turn in turns:
            assert parse_turn(turn, StopReason.CALL, router.registry, in_thought=True).well_formed
        longest = router.longest_turn(tokens.count, in_thought=True)
        assert max(len(tokens.encode(turn)) for turn in turns[:-1]) <= longest
        begun = " a chart " if one.task.source == "charts" else ""
        assert [turn.partition("</think>")[0] for turn in turns] == [f"{begun}\n", "\n", "\n"]
        assert all(tokens.decode(ids).endswith("assistant\n<think>\n") for own, ids in pieces(one) if not own)


def test_rehearsals_reach_every_token_of_letters(tokens: Tokens) -> None:
    rng, quoted = np.random.default_rng(0), set()
    texts = letter_pieces(tokens)
    for _ in range(4000):
        quoted |= set(tokens.encode(f" {random_text(['word'], texts, rng)}"))
    letters = {i for i in range(tokens.size) if tokens.decode([i]).strip().isalpha()}
    ascii_letters = {i for i in letters if tokens.decode([i]).isascii()}
    # Byte-pair merges join some neighbours into other tokens, so a rare few stay out of reach.
    assert len(ascii_letters & quoted) > 0.95 * len(ascii_letters) > 50


def test_a_long_reply_is_quoted_as_far_as_it_was_shown(write: Callable[..., Any], tokens: Tokens) -> None:
    written, _, exchange = write(lambda call, question: "12345 " * 20)
    shown = exchange.body_ids("12345 " * 20)
    assert len(shown) == EPISODE.observation_tokens
    for one in written:
        _, (_, observation), (_, answer) = pieces(one)
        assert answer == [*tokens.encode("<answer>"), *shown, *tokens.encode(" </answer>")]
        assert tokens.decode(shown) in tokens.decode(observation)


def test_a_useless_reply_is_followed_by_a_second_call(
    write: Callable[..., Any], tokens: Tokens, tasks: list[Task]
) -> None:
    written, experts, exchange = write(lambda call, question: NO_HELP, second_call=1.0)
    first, second = experts.calls[: len(tasks)], experts.calls[len(tasks) :]
    unhelpful = Observation(NO_HELP, Status.OK)
    for one, (call, _), (other, _) in zip(written, first, second, strict=True):
        assert pieces(one) == [
            (True, tokens.encode(call_text(call))),
            (False, exchange.observation_ids(unhelpful, last=False)),
            (True, tokens.encode(call_text(other))),
            (False, exchange.observation_ids(unhelpful, last=True)),  # the budget of two is used up
            (True, tokens.encode(answer_text(NO_HELP))),
        ]


def test_a_budget_of_one_call_leaves_no_second(write: Callable[..., Any], tasks: list[Task]) -> None:
    _, experts, _ = write(lambda call, question: NO_HELP, second_call=1.0, max_calls=1)
    assert len(experts.calls) == len(tasks)


def test_tags_and_special_tokens_in_a_reply_are_quoted_harmlessly(write: Callable[..., Any], tokens: Tokens) -> None:
    written, _, _ = write(lambda call, question: "</answer><|im_end|> 4")
    for one in written:
        answer = pieces(one)[-1][1]
        assert tokens.decode(answer) == answer_text("‹/answer›‹|im_end|› 4")
        assert not tokens.special_ids & set(answer)


def test_rehearsals_ask_no_expert(write: Callable[..., Any], tokens: Tokens) -> None:
    written, experts, _ = write(echo, rehearsal=1.0)
    assert experts.calls == []
    assert len({tokens.decode(pieces(one)[-1][1]) for one in written}) > 1


def test_tasks_without_answers_can_be_rehearsed(
    instant_experts: Any, make_router: Make, tokens: Tokens, tasks: list[Task]
) -> None:
    router = make_router(rehearsal=1.0)
    exchange = Exchange(tokens, router.registry, instant_experts(echo), EPISODE)
    unanswered = [dataclasses.replace(task, answers=()) for task in tasks]
    assert len(write_demonstrations(unanswered, router, exchange, 0, Progress(io.StringIO()))) == len(tasks)


def test_tasks_are_read_when_they_are_needed(
    instant_experts: Any, make_router: Make, tokens: Tokens, tasks: list[Task]
) -> None:
    router = make_router(rehearsal=0.5)
    exchange = Exchange(tokens, router.registry, instant_experts(echo), EPISODE)
    source = Fresh(tasks * 20)
    view = OnDemand(range(240), source.__getitem__)
    written = write_demonstrations(view, router, exchange, 0, Progress(io.StringIO()))
    assert [one.task.id for one in written] == [task.id for task in tasks * 20]
    assert source.most_alive < 5


def test_progress_ends_at_the_number_of_calls(
    instant_experts: Any, make_router: Make, tokens: Tokens, tasks: list[Task]
) -> None:
    experts, router = instant_experts(lambda call, question: NO_HELP), make_router(rehearsal=0.5, second_call=1.0)
    stream = io.StringIO()
    with Progress(stream) as progress:
        write_demonstrations(tasks, router, Exchange(tokens, router.registry, experts, EPISODE), 0, progress)
    ends = re.findall(r"^demonstrations.*: (\d+)/(\d+) in", stream.getvalue(), re.MULTILINE)
    assert len(ends) == 2 and all(done == total for done, total in ends)
    assert sum(int(done) for done, _ in ends) == len(experts.calls)


def test_the_seed_decides_and_the_order_of_arrival_does_not(write: Callable[..., Any]) -> None:
    settings = {"rehearsal": 0.5, "second_call": 0.5}

    def reply(call: Call, question: str) -> str:
        return NO_HELP if call.expert == "Chart-Lens" else echo(call, question)

    forwards, _, _ = write(reply, **settings)
    backwards, _, _ = write(reply, backwards=True, **settings)
    other_seed, _, _ = write(reply, seed=1, **settings)
    assert forwards == backwards
    assert forwards != other_seed


def test_experts_see_the_question_and_never_the_gold_answer(write: Callable[..., Any], tasks: list[Task]) -> None:
    _, experts, _ = write(echo)
    assert [question for _, question in experts.calls] == [task.question for task in tasks]
    assert not any("gold" in f"{call}{question}" for call, question in experts.calls)


def test_the_tokenizer_learns_calls_and_frames(make_router: Make, tasks: list[Task]) -> None:
    router = make_router()
    texts = tokenizer_texts("the system prompt", tasks, router, ["a frame"])
    assert set(router.texts()) < set(texts) and {"the system prompt", "a frame", tasks[0].question} < set(texts)
    assert len(router.texts()) == 4 * 2  # four experts, two phrases of one skill; the other skill has none
