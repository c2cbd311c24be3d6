"""Episodes of a checkpoint whose template opens thoughts: whatever it reads, it reads as transformers renders it.

Some words of its vocabulary are whole turns, which close the thought and act. Others act without closing it, or do
nothing. Lanes are fewer than trajectories, so that contexts are parked and cut back as well.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.errors import ConfigError
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.exchange import Exchange
from maestro_jax.rollout.trajectory import Trajectory
from tests.policy import qwen, reference
from tests.rollout import episodes, toy
from tests.rollout.test_as_text import conversation, runs
from tests.rollout.test_episodes_like_transformers import TOLERANCE, forward

BEFORE = "hm</think>\n\n"
TASKS = [episodes.task(0), episodes.task(3)]  # without images
MEMBERS = 4
LANES = len(TASKS) * MEMBERS
EPISODE = dataclasses.replace(episodes.EPISODE, turn_budget=40, room=320)
ENGINE = dataclasses.replace(
    episodes.ENGINE, turn_budget=40, room=320, lanes=LANES // 2, parked_tokens=LANES * EPISODE.room
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> episodes.Talker:
    directory = tmp_path_factory.mktemp("thinker")
    tokens = qwen.thinking(episodes.make_tokens(directory, BEFORE))
    params = reference.as_params(reference.weights_of(episodes.torch_model(tokens, BEFORE)), episodes.model_config())
    return episodes.Talker(directory, tokens, reference.load(params, episodes.model_config()))


def rollout_of(thinker: episodes.Talker, earlier_thoughts: str) -> Rollout:
    episode = dataclasses.replace(EPISODE, earlier_thoughts=earlier_thoughts)
    dispatcher = episodes.NumberedDispatcher(episodes.Experts(0.02))
    with episodes.engine(thinker, dispatcher, ENGINE, episode=episode) as run:
        found = run(TASKS, MEMBERS)
        assert run.total("parked") and run.total("loaded")
    members = [trajectory for group in found.trajectories for trajectory in group]
    assert sum(trajectory.turns > 2 for trajectory in members) >= 3
    # A turn that closes its thought keeps the format; one that does not breaks it.
    closed = 0
    for trajectory in members:
        texts = [thinker.tokens.decode(ids) for own, ids in runs(trajectory) if own]
        whole = all(text.count("</think>") == 1 for text in texts) and trajectory.answer is not None
        assert trajectory.well_formed == whole
        closed += sum("</think>\n\n<search>" in text for text in texts)
    assert closed >= 3
    return found


def rendered(messages: list[dict[str, Any]], thinker: episodes.Talker) -> str:
    """As transformers renders them for the next turn."""
    tokenizer: Any = thinker.tokens.tokenizer
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_ids(rollout: Rollout, group: int) -> list[int]:
    return [*rollout.prompts.root.tolist(), *rollout.prompts.tokens[group][rollout.prompts.mask[group]].tolist()]


def test_kept_thoughts_stand_between_what_transformers_renders(thinker: episodes.Talker) -> None:
    """What was sampled stays; all else are the ids of the template, at every turn."""
    found, encode = rollout_of(thinker, "keep"), thinker.tokens.encode
    for group, members in enumerate(found.trajectories):
        for trajectory in members:
            messages = conversation(trajectory, thinker.tokens)
            assert prompt_ids(found, group) == encode(rendered(messages[:2], thinker))
            for number, (own, ids) in enumerate(runs(trajectory), start=2):
                if own:
                    messages[number]["content"], last = "a turn", ids
                else:
                    behind = rendered(messages[: number + 1], thinker).rpartition("a turn")[2]
                    closed = last[-1] == thinker.tokens.end_of_turn
                    assert behind.endswith("<think>\n") and encode(behind)[closed:] == ids


def test_dropped_thoughts_leave_what_transformers_renders(thinker: episodes.Talker) -> None:
    """Every turn has the log-probabilities that it has behind the rendering of the whole conversation before it."""
    found = rollout_of(thinker, "drop")
    contexts = [
        (group, context, ids, logprobs)
        for group, members in enumerate(found.trajectories)
        for trajectory in members
        for context, ids, logprobs in turns(trajectory, thinker)
    ]
    assert sum("<information>" in thinker.tokens.decode(context) for _, context, _, _ in contexts) > LANES / 2
    rows = np.zeros((len(contexts), 1, EPISODE.room + 16), np.int32)
    mask, sampled = np.zeros(rows.shape, bool), np.zeros(rows.shape, np.float32)
    for row, (group, context, ids, logprobs) in enumerate(contexts):
        prompt = prompt_ids(found, group)
        assert context[: len(prompt)] == prompt
        start = len(context) - len(prompt)
        rows[row, 0, : start + len(ids)] = [*context[len(prompt) :], *ids]
        mask[row, 0, start : start + len(ids)] = True
        sampled[row, 0, start : start + len(ids)] = logprobs
    difference = np.abs(trained(thinker, found, [group for group, *_ in contexts], rows, mask) - sampled)[mask]
    assert difference.size > 10 * LANES and difference.max() <= TOLERANCE


def turns(trajectory: Trajectory, thinker: episodes.Talker) -> list[tuple[list[int], list[int], list[float]]]:
    """Each turn behind the rendering of what was said before it: ids of that, ids of the turn, log-probabilities."""
    messages, found, at = conversation(trajectory, thinker.tokens), [], 0
    for number, (own, ids) in enumerate(runs(trajectory), start=2):
        if own:
            context = thinker.tokens.encode(rendered(messages[:number], thinker))
            found.append((context, ids, trajectory.logprobs[at : at + len(ids)]))
            if messages[number]["content"][:1].isspace():  # may be read as one token with the line end before it
                break
        at += len(ids)
    return found


def trained(
    thinker: episodes.Talker, rollout: Rollout, groups: list[int], rows: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Log-probabilities `[rows, 1, R]` of members behind the prompts of these groups, by the forward of the update."""
    left_out = "<think>\n"
    prompts = episodes.make_prompts(thinker, left_out).batch([TASKS[group] for group in groups])
    zeros = np.zeros(rows.shape, np.float32)
    arrays = (rows, np.full(rows.shape[:2], rows.shape[2], np.int32), mask, zeros, zeros, zeros[..., 0])
    batch = GroupBatch(prompts, *map(jnp.asarray, arrays), jnp.asarray(loss_rows(mask)))
    graph, params = nnx.split(thinker.policy, nnx.Param)
    return np.asarray(jax.device_get(forward(graph)(params, batch)))


def test_a_template_that_opens_no_thought_has_none_to_drop(toy_tokens: Any) -> None:
    episode = dataclasses.replace(EPISODE, earlier_thoughts="drop")
    with pytest.raises(ConfigError, match='earlier_thoughts="drop" needs a chat template that opens a thought'):
        Exchange(toy_tokens, toy.Names(), toy.Desk(), episode)  # type: ignore[arg-type]
