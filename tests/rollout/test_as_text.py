"""Episodes as text: what the exported chat template renders, its tokenizer reads as the ids that were trained on.

What the policy wrote is as it was sampled, which text need not be; all that it was shown is compared.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.errors import ConfigError
from maestro_jax.policy.hf_export import write_config_files
from maestro_jax.policy.tokens import END_OF_TURN, Tokens
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.types import Observation, Status
from tests.rollout import episodes, toy

MEMBERS = 4
TASKS = [episodes.task(number) for number in range(3)]


# ---- a finished episode ------------------------------------------------------------------------------------


def conversation(trajectory: Trajectory, tokens: Tokens) -> list[dict[str, Any]]:
    """The messages of an episode, as somebody who drives the policy with text would keep them."""
    task = trajectory.task
    question = [*[{"type": "image"} for _ in task.images], {"type": "text", "text": task.question}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You may call."}]
    messages.append({"role": "user", "content": question})
    for authored, ids in runs(trajectory):
        if authored:
            messages.append({"role": "assistant", "content": tokens.decode(ids)})
        else:
            text = tokens.tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]
            content = text.partition("<|im_start|>user\n")[2].partition(END_OF_TURN)[0]
            messages.append({"role": "user", "content": content})
    return messages


def runs(trajectory: Trajectory) -> Iterator[tuple[bool, list[int]]]:
    """Turns of the policy and what it was told between them, with who wrote them."""
    start, own = 0, [*trajectory.authored]
    for end in range(1, len(own) + 1):
        if end == len(own) or own[end] != own[start]:
            yield own[start], trajectory.tokens[start:end]
            start = end


def shown(ids: Sequence[int], tokens: Tokens) -> list[list[int]]:
    """What the policy did not write: turns of the system and of users, each image as one token."""
    turns: list[list[int]] = []
    for token in ids:
        if token == tokens.special_id("<|im_start|>"):
            turns.append([])
        elif turns and not (token == tokens.image and turns[-1][-1:] == [token]):
            turns[-1].append(token)
    return [turn for turn in turns if turn[:1] != tokens.encode("assistant")[:1]]


def test_an_episode_as_text_has_the_ids_that_were_trained_on(talker: episodes.Talker, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write_config_files(talker.policy.architecture, talker.directory, "float32", (32 * 32, 32 * 96), tmp_path)
    exported, tokens = PreTrainedTokenizerFast.from_pretrained(str(tmp_path)), talker.tokens
    dispatcher = episodes.NumberedDispatcher(episodes.Experts(0.0))
    short = dataclasses.replace(episodes.EPISODE, observation_tokens=6)  # of which a multiple of 4 is 8
    with episodes.engine(talker, dispatcher, episodes.ENGINE, episode=short) as run:
        rollout = run(TASKS, MEMBERS)
    filled = cut = 0
    for g, group in enumerate(rollout.trajectories):
        prompt = [*rollout.prompts.root.tolist(), *rollout.prompts.tokens[g][rollout.prompts.mask[g]].tolist()]
        for trajectory in group:
            messages = conversation(trajectory, tokens)
            read = exported.apply_chat_template(messages, tokenize=True, return_dict=False)
            told = [token for authored, ids in runs(trajectory) if not authored for token in ids]
            assert shown(read, tokens) == shown([*prompt, *told], tokens)
            observations = [message["content"] for message in messages[2:] if message["role"] == "user"]
            filled += sum(" . </information>" in text for text in observations)
            cut += sum(" ..." in text for text in observations)
    assert filled > 2 and cut > 2


# ---- whatever an expert says -------------------------------------------------------------------------------

CONFIG = EpisodeConfig(
    max_calls=2, observation_tokens=12, observation_multiple=8, deadline=30.0, turn_budget=24, room=160
)
PIECES = st.sampled_from(
    ["red", " 42", ".", " .", "...", "\n", "\n\n", " ", "  ", "\t", "'s", "I'LL", "é", "\u0301", "你好", "🙂"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=24).map("".join)


def exchange_of(tokens: Tokens) -> Exchange:
    return Exchange(tokens, toy.Names(), toy.Desk(), CONFIG)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exchange(toy_tokens: Tokens) -> Exchange:
    return exchange_of(toy_tokens)


def assert_read_alike(exchange: Exchange, text: str, last: bool) -> None:
    ids = exchange.observation_ids(Observation(text, Status.OK), last)
    whole = exchange.tokens.tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[attr-defined]
    assert exchange.tokens.encode(whole) == ids
    body = len(ids) - len(exchange.observation_ids(Observation("", Status.OK), last))
    assert body % CONFIG.observation_multiple == 0 and len(ids) <= exchange.observation_bucket


@given(text=TEXTS, last=st.booleans())
def test_an_observation_is_read_as_the_ids_that_it_has(exchange: Exchange, text: str, last: bool) -> None:
    assert_read_alike(exchange, text, last)


def test_a_tokenizer_without_a_token_that_fills_is_refused(toy_tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_jax.rollout.exchange._FILLER", "\n\n")
    with pytest.raises(ConfigError, match="observation_multiple=8 fills observations .* set it to 1"):
        exchange_of(toy_tokens)
    config = dataclasses.replace(CONFIG, observation_multiple=1)
    assert Exchange(toy_tokens, toy.Names(), toy.Desk(), config)  # type: ignore[arg-type]
