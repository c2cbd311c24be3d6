"""How long episodes and turns get: computed in the run's own tokens, and checked where it is given."""

import dataclasses
import re
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import quickstart
from maestro_jax.config import Config, parse_config
from maestro_jax.errors import ConfigError
from maestro_jax.policy.tokens import Tokens
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.limits import Limits
from maestro_jax.session.policy import fields
from maestro_jax.session.rollouts import sized_episodes
from maestro_jax.suite.demonstrations import WeakRouter
from maestro_jax.types import Observation, Status
from tests.rollout import toy


def config_with(**rollout: Any) -> Config:
    raw: ConfigDict = quickstart.get_config()
    # The toy's tokenizer cuts the names of the suite's experts into many tokens.
    raw.rollout.update({"turn_budget": 96, "member_buckets": (80,)} | rollout)
    return parse_config(raw)


def sized(config: Config, tokens: Tokens, demonstrated: int = 0) -> tuple[Config, list[str]]:
    notes: list[str] = []
    return sized_episodes(config, tokens.count, notes.append, demonstrated), notes


def longest(config: Config, tokens: Tokens) -> int:
    """Tokens of an episode that uses up every turn and hears only long replies."""
    exchange = Exchange(tokens, toy.Names(), toy.Desk(), fields(EpisodeConfig, config.rollout))  # type: ignore[arg-type]
    calls, reply = config.rollout.max_calls, Observation("7 " * 1000, Status.OK)
    told = [len(exchange.observation_ids(reply, last=number == calls)) for number in range(1, calls + 1)]
    assert exchange.observation_bucket >= max(told, default=0)
    return (calls + 1) * config.rollout.turn_budget + sum(told)


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_room_that_is_not_given_holds_every_episode(calls: int, multiple: int, toy_tokens: Tokens) -> None:
    config = config_with(max_calls=calls, observation_multiple=multiple)
    found, notes = sized(config, toy_tokens)
    needed = longest(config, toy_tokens)
    assert needed <= found.rollout.room < needed + 128 and found.rollout.room % 16 == 0
    assert found.rollout.member_buckets == (80, found.rollout.room) and not notes
    assert dataclasses.replace(found, rollout=config.rollout) == config  # nothing else


def test_the_longest_observation_is_that_of_the_exchange(toy_tokens: Tokens) -> None:
    config = config_with(observation_multiple=5)
    episode = fields(EpisodeConfig, config.rollout)
    exchange = Exchange(toy_tokens, toy.Names(), toy.Desk(), episode)  # type: ignore[arg-type]
    assert Limits.of(config.registry, episode, toy_tokens.count).observation == exchange.observation_bucket


@pytest.mark.parametrize(("room", "buckets"), [(400, (80, 400)), (80, (80,))])
def test_a_room_that_is_given_is_taken_and_what_it_cuts_is_said(
    room: int, buckets: tuple[int, ...], toy_tokens: Tokens
) -> None:
    config = config_with(room=room, turn_budget=79, member_buckets=(80, 4096), max_calls=1)
    # As if names were short, so that a short episode fits into 80.
    notes: list[str] = []
    found = sized_episodes(config, lambda text: len(text) // 8, notes.append)
    assert (found.rollout.room, found.rollout.member_buckets) == (room, buckets)
    cut = (
        "room=80 cuts episodes that are longer: config.rollout.max_calls=1 calls and an answer of up to turn_budget=79"
    )
    assert ([cut in note for note in notes]) == ([] if room == 400 else [True])
    assert sized(config_with(room=1024), toy_tokens)[1] == []


def test_one_error_has_every_number_of_a_room_that_is_too_small(toy_tokens: Tokens) -> None:
    config = config_with(max_calls=3)
    limits = Limits.of(config.registry, fields(EpisodeConfig, config.rollout), toy_tokens.count)
    budget = limits.call
    config = config_with(max_calls=3, turn_budget=budget, room=budget + 1)
    with pytest.raises(ConfigError) as refused:
        sized(config, toy_tokens)
    numbers = {int(number) for number in re.findall(r"\d+", str(refused.value))}
    computed = sized(config_with(max_calls=3, turn_budget=budget), toy_tokens)[0].rollout.room
    assert numbers >= {budget + 1, 3, budget, limits.call, limits.answer, limits.text, limits.last_frame, computed}
    assert "Set it to 0, and it is computed" in str(refused.value)


def test_a_turn_budget_that_cuts_every_call_is_refused_with_the_smallest_that_works(toy_tokens: Tokens) -> None:
    config = config_with(turn_budget=16)
    limits = Limits.of(config.registry, fields(EpisodeConfig, config.rollout), toy_tokens.count)
    assert limits.call > 16  # in the toy's tokens
    message = f"turn_budget=16 cuts .* shortest call has {limits.call}, the shortest answer {limits.answer}; set it to"
    with pytest.raises(ConfigError, match=f"{message} {limits.call} or more"):
        sized(config, toy_tokens)
    assert sized(config_with(turn_budget=limits.call), toy_tokens)[0].rollout.room
    texts = [f"<search> {e.name}@@{s.name}: </search>" for e in config.registry.experts for s in config.registry.skills]
    assert min(map(toy_tokens.count, texts)) <= limits.call - 1


def test_a_turn_budget_that_cuts_what_is_demonstrated_is_refused(toy_tokens: Tokens) -> None:
    config = config_with()
    router = WeakRouter(config.registry, config.warm_start)
    longest = router.longest_turn(toy_tokens.count)
    assert longest >= max(map(toy_tokens.count, router.texts()))
    assert sized(config_with(turn_budget=longest), toy_tokens, longest)[0].rollout.turn_budget == longest
    with pytest.raises(ConfigError, match=f"demonstration with its thought {longest}; set it to {longest} or more"):
        sized(config_with(turn_budget=longest - 1), toy_tokens, longest)
