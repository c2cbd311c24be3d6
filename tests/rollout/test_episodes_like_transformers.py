"""Whole greedy episodes against a plain loop of transformers, whatever lanes, parking and chunks the engine has.

The loop has no cache, no lanes and no automaton: each token is the argmax of a pass over the whole conversation with
its images, and a turn's end is looked for in its text. Experts answer late, and each member differently.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch, member_logprobs
from maestro_jax.images import decode_image
from maestro_jax.policy.model import Policy
from maestro_jax.policy.preprocess import PreparedImage, prepare_image
from maestro_jax.policy.prompts import Prompts
from maestro_jax.policy.tokens import Tokens
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.exchange import Exchange
from maestro_jax.rollout.protocol import TurnKind, parse_turn
from maestro_jax.types import Observation, Status, StopReason, Task
from tests.rollout import episodes, toy
from tests.rollout.episodes import EPISODE, Episode

GROUPS, MEMBERS = 3, 4  # no image; a wide one; two that are not square
TASKS = [episodes.task(number) for number in range(GROUPS)]
LATE = 0.03  # seconds; a chunk of tokens takes less
TOLERANCE = 2e-5  # fp32; a cache and another order of sums, nothing else

LANES = GROUPS * MEMBERS
ROOM = EPISODE.room
MOVES = ("parked", "loaded", "unloaded", "brought_back")  # what becomes of lanes whose trajectory has to wait
# Settings, and which of these happen under them.
VARIANTS: dict[str, tuple[dict[str, int], set[str]]] = {
    "a lane for each": (dict(lanes=LANES), set()),
    "chunks of 3": (dict(lanes=LANES, decode_chunk=3), set()),
    "lanes held": (dict(lanes=LANES // 3), set()),
    "parked on the device": (dict(lanes=LANES // 3, parked_tokens=LANES * ROOM), {"parked", "loaded"}),
    "parked on the host, chunks of 3": (
        dict(lanes=LANES // 3, parked_on_host=2**30, decode_chunk=3),
        {"unloaded", "brought_back"},
    ),
    "parked on both": (
        dict(lanes=LANES // 3, parked_tokens=ROOM, parked_on_host=2**30),
        {"parked", "loaded", "unloaded", "brought_back"},
    ),
}


# ---- the plain loop ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loop:
    """One conversation at a time, with everything computed anew for every token."""

    model: Any
    tokens: Tokens
    prompts: Prompts
    exchange: Exchange  # for the ids of what experts say
    temperature: float

    def episode(self, task: Task, number: int) -> tuple[Episode, list[StopReason]]:
        """The greedy episode of trajectory `number`, and how its turns ended."""
        images, found, stops = self.images(task), Episode([], [], []), []
        prompt = self.prompt(task)
        while True:
            room = EPISODE.room - len(found.tokens)
            turn, logprobs, stop = self.turn([*prompt, *found.tokens], images, room)
            add(found, turn, logprobs, authored=True)
            stops.append(stop)
            told = self.told(task, number, turn, stop, len(stops))
            if told is None or len(found.tokens) + len(told) >= EPISODE.room:
                return found, stops
            add(found, told, [0.0] * len(told), authored=False)

    def turn(
        self, conversation: Sequence[int], images: Sequence[PreparedImage], room: int
    ) -> tuple[list[int], list[float], StopReason]:
        """Tokens until the turn ends, their log-probabilities, and why it ended."""
        turn: list[int] = []
        logprobs: list[float] = []
        while not (stop := self.stop(turn, room)):
            logits = self.logits([*conversation, *turn], images) / self.temperature
            turn.append(int(logits.argmax()))
            logprobs.append(float(logits[turn[-1]] - np.logaddexp.reduce(logits)))
        return turn, logprobs, stop

    def stop(self, turn: Sequence[int], room: int) -> StopReason:
        text = self.tokens.decode(turn)
        ends = {"</search>": StopReason.CALL, "</answer>": StopReason.ANSWER}
        at = {text.find(tag): stop for tag, stop in ends.items() if tag in text}
        if turn and turn[-1] == self.tokens.end_of_turn:
            return StopReason.END_OF_TURN
        if at:
            return at[min(at)]
        return StopReason.BUDGET if len(turn) == min(EPISODE.turn_budget, room) else StopReason.NONE

    def told(self, task: Task, number: int, turn: Sequence[int], stop: StopReason, turns: int) -> list[int] | None:
        """What is appended behind turn number `turns`; None if the episode ends with it."""
        parsed = parse_turn(self.tokens.decode(turn), stop, toy.Names())
        if parsed.kind is TurnKind.ANSWER or turns > EPISODE.max_calls:
            return None
        said = parsed.error
        if parsed.call is not None:
            said = episodes.reply(task.question, episodes.numbered(parsed.call, number).query)
        ids = self.exchange.observation_ids(Observation(said, Status.OK), last=turns == EPISODE.max_calls)
        return ids[1:] if stop is StopReason.END_OF_TURN else ids

    def logits(self, ids: Sequence[int], images: Sequence[PreparedImage]) -> np.ndarray:
        """Of the next token, float64 `[V]` (computed in fp32)."""
        import torch

        row = torch.tensor(ids)[None]
        pixels = {}
        if images:
            pixels["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in images]))
            pixels["image_grid_thw"] = torch.tensor([[1, image.rows, image.columns] for image in images])
        kinds = (row == self.tokens.image).int()
        with torch.no_grad():
            found = self.model(
                input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=kinds, logits_to_keep=1, **pixels
            )
        return found.logits[0, -1].double().numpy()

    def prompt(self, task: Task) -> list[int]:
        batch = self.prompts.batch([task])
        return [*batch.root.tolist(), *batch.tokens[0][batch.mask[0]].tolist()]

    def images(self, task: Task) -> list[PreparedImage]:
        limits = (self.prompts.config.min_pixels, self.prompts.config.max_pixels)
        vision = self.prompts.architecture.vision
        return [prepare_image(decode_image(data, task.id), vision, *limits) for data in task.images]


def add(episode: Episode, tokens: Sequence[int], logprobs: Sequence[float], authored: bool) -> None:
    episode.tokens.extend(tokens)
    episode.logprobs.extend(logprobs)
    episode.authored.extend([authored] * len(tokens))


# ---- fixtures ----------------------------------------------------------------------------------------------

At = tuple[int, int]
Plain = dict[At, tuple[Episode, list[StopReason]]]


@pytest.fixture(scope="module")
def plain(talker: episodes.Talker) -> Plain:
    exchange = Exchange(talker.tokens, toy.Names(), toy.Desk(), EPISODE)  # type: ignore[arg-type]
    model = episodes.torch_model(talker.tokens)
    loop = Loop(model, talker.tokens, episodes.make_prompts(talker), exchange, episodes.ENGINE.temperature)
    numbers = {(g, m): g * MEMBERS + m for g in range(GROUPS) for m in range(MEMBERS)}
    return {at: loop.episode(TASKS[at[0]], number) for at, number in numbers.items()}


@dataclasses.dataclass(frozen=True)
class Found:
    greedy: Rollout
    sampled: Rollout


@pytest.fixture(scope="module", params=VARIANTS)
def found(request: pytest.FixtureRequest, talker: episodes.Talker) -> Found:
    settings, moves = VARIANTS[request.param]
    config = dataclasses.replace(episodes.ENGINE, **settings)
    with episodes.engine(talker, episodes.NumberedDispatcher(episodes.Experts(LATE)), config) as run:
        greedy = run(TASKS, MEMBERS, greedy=True)
        assert {name for name in MOVES if run.total(name)} == moves
        return Found(greedy, run(TASKS, MEMBERS))


# ---- tests -------------------------------------------------------------------------------------------------


def test_greedy_episodes_are_those_of_a_plain_loop(found: Found, plain: Plain) -> None:
    episodes.assert_same(
        episodes.episodes(found.greedy), {at: episode for at, (episode, _) in plain.items()}, TOLERANCE
    )


def test_the_comparison_covers_turns_members_and_every_way_to_stop(plain: Plain) -> None:
    stops = Counter(stop for _, stops in plain.values() for stop in stops)
    assert stops.keys() == {StopReason.CALL, StopReason.ANSWER, StopReason.END_OF_TURN, StopReason.BUDGET}
    assert stops[StopReason.CALL] > LANES  # experts were asked, and lanes had to wait
    assert sum(len(stops) >= 3 for _, stops in plain.values()) > LANES / 2
    assert any(len(episode.tokens) == ROOM for episode, _ in plain.values())  # the last turn was cut by the room
    last = [stops[-1] for _, stops in plain.values() if len(stops) <= EPISODE.max_calls]
    assert set(last) - {StopReason.ANSWER}  # an observation found no room
    for group in range(GROUPS):
        assert len({tuple(plain[group, m][0].tokens) for m in range(MEMBERS)}) == MEMBERS


def test_sampled_logprobs_are_those_of_the_training_forward(found: Found, talker: episodes.Talker) -> None:
    difference = np.abs(trained_logprobs(talker.policy, found.sampled) - found.sampled.logprobs)[found.sampled.authored]
    assert difference.size > 10 * LANES and difference.max() <= TOLERANCE


def trained_logprobs(policy: Policy, rollout: Rollout) -> np.ndarray:
    """Of the rollout's tokens, float32 `[B, G, R]`, by the forward pass of the update."""
    zeros = np.zeros(rollout.logprobs.shape, np.float32)
    arrays = (rollout.tokens, rollout.length, rollout.authored, zeros, zeros, zeros[..., 0])
    batch = GroupBatch(rollout.prompts, *map(jnp.asarray, arrays), jnp.asarray(loss_rows(rollout.authored)))
    graph, params = nnx.split(policy, nnx.Param)
    return np.asarray(forward(graph)(params, batch))


@functools.cache
def forward(graph: nnx.GraphDef) -> Callable[[nnx.State, GroupBatch], jax.Array]:
    temperature = episodes.ENGINE.temperature

    def logprobs(params: nnx.State, batch: GroupBatch) -> jax.Array:
        return member_logprobs(nnx.merge(graph, params), batch, temperature, chunk=episodes.VOCABULARY // 3)[0]

    return jax.jit(logprobs)
