"""Our engine on scripted episodes: all of it but the policy, whose tokens are known and whose steps take a given time.

In: traces (`traces.py`) and the port of an expert server. Out: finished rollouts, and what every chunk of decoding did.
The engine, its scheduler, exchange, dispatcher and device programs are those of a run; keys and values are of the
smallest policy, so moving them costs next to nothing.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.expert_server import OBSERVATION, AsyncExpertClient
from benchmarks.models import TOWER
from benchmarks.pairs import MismatchError
from benchmarks.traces import FIRST_TASK, NAME_LENGTH, NAME_MARK, OPENING, Trace, call_name, task_name, write_turn
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.attention.cascade import LaneKV, View, take
from maestro_jax.policy.config import PolicyArchitecture, TextConfig
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.text import Context, LayerKV
from maestro_jax.policy.tokens import CHAT_TEMPLATE, END_OF_TURN, SPECIAL_TOKENS, Tokens, load_tokens
from maestro_jax.registry.description.config import Pair
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Engine, EngineConfig, lane_key
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange
from maestro_jax.rollout.scheduler import Orders
from maestro_jax.rollout.session import Compiled, Session
from maestro_jax.rollout.state import Lanes, RolloutSizes
from maestro_jax.rollout.trajectory import GroupRecord, Trajectory
from maestro_jax.types import Call, Observation, Status, Task

Array = jax.Array

MAX_CALLS = 4
VOCABULARY = 64
_UNKNOWN = "<|unknown|>"
_CALL, _ANSWER = "<search> Glyph@@Reading: {}</search>", "<answer> done</answer>"
# Words of all that policies write and experts say; what else stands in a prompt is unknown.
_WORDS = (
    *("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", NAME_MARK, "\n", " ", ".", '"', "user", "assistant", "system"),
    *("<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>", " Glyph@@Reading: "),
    *(" done", " Answer now.", "the", " the", " figure", " shows"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *('{"name": "expert", "arguments": {"call": "', '"}}'),
)
_SURE = 40.0  # logit of the scripted token; the others have 0
_PREFIX = 32  # tokens, a bucket
_SEED = 0
_LATE = 2e-4  # seconds that a sleep may last too long; a device is on time


def make_tokens(directory: Path) -> Tokens:
    """A tokenizer with few words, saved for all sides.

    A step samples from as many logits as there are words, on the host's cores here: with thousands of them sampling
    alone would take longer than a step may.
    """
    words = {word: number for number, word in enumerate((*SPECIAL_TOKENS, _UNKNOWN, *_WORDS))}
    backend = Tokenizer(models.WordLevel(words, unk_token=_UNKNOWN))
    longest_first = "|".join(map(re.escape, sorted(_WORDS, key=len, reverse=True)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=SPECIAL_TOKENS[0],
        unk_token=_UNKNOWN,
        additional_special_tokens=[*SPECIAL_TOKENS, _UNKNOWN],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(str(directory))
    return load_tokens(directory)


# ---- the policy ----------------------------------------------------------------------------------------------


class ScriptedPolicy(nnx.Module):
    """The interface of `Policy` that a rollout uses: the next token stands in a script.

    A prompt names its group, a slot the member; together they tell the script. Hidden states are logits.

    Args:
      scripts: float32 `[groups * members, R]` of ids, member by member: what stands at every place of its tokens.
        Places of observations may hold anything.
    """

    def __init__(self, tokens: Tokens, scripts: np.ndarray, members: int):
        self.architecture = architecture(tokens)
        self.compute_dtype = jnp.float32
        self.members = members
        (self.mark,), (self.zero,), (self.opening,) = map(tokens.encode, (NAME_MARK, "0", OPENING))
        self.scripts = nnx.Param(jnp.asarray(scripts), axes=(None, None))

    def encode_root(self, root: Array) -> Context:
        return self._context(jnp.zeros(root.shape))

    def encode_prompts(self, batch: PrefixBatch, root: Context) -> tuple[Context, Array]:
        place = jnp.argmax(batch.tokens == self.mark, axis=1)[:, None] + 1 + jnp.arange(NAME_LENGTH)
        digits = jnp.take_along_axis(jnp.asarray(batch.tokens), place, axis=1) - self.zero
        group = digits @ 10 ** jnp.arange(NAME_LENGTH)[::-1] - FIRST_TASK
        number = jnp.broadcast_to(group[:, None], batch.tokens.shape)
        return self._context(number), self._logits(jnp.full(batch.tokens.shape[:1], self.opening))

    def for_decoding(self) -> "ScriptedPolicy":
        return self

    def extend(
        self, tokens: Array, steps: Array, view: View, fresh: LaneKV, at: Array | int, mask: Array
    ) -> tuple[Array, LaneKV]:
        if view.assignment is None:  # an observation, behind which a turn opens
            return self._logits(jnp.full(tokens.shape, self.opening)), fresh
        group = take(view.shared.keys[0][:, :, 0, 0, 0], view.group)
        script = group.astype(jnp.int32) * self.members + view.assignment.member_slot % self.members
        following = self.scripts[...].at[script[..., None], steps + 1].get(mode="clip")
        return self._logits(following.astype(jnp.int32)), fresh

    def logits(self, hidden: Array) -> Array:
        return hidden

    def _logits(self, token: Array) -> Array:
        return _SURE * jax.nn.one_hot(token, VOCABULARY)

    def _context(self, number: Array) -> Context:
        """Keys that are the number of each token's group."""
        keys = number[..., None, None].astype(jnp.float32)
        return Context(LayerKV([keys], [jnp.zeros_like(keys)]), jnp.ones(number.shape, bool))


def architecture(tokens: Tokens) -> PolicyArchitecture:
    """One layer with keys and values of one number; hidden states as wide as the vocabulary."""
    text = TextConfig(VOCABULARY, VOCABULARY, 1, 1, 1, 1, 1, 1e-6, 1e6, (1, 0, 0))
    vision = dataclasses.replace(TOWER, out_hidden_size=VOCABULARY)
    start, end, image = (tokens.special_id(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad"))
    assert start is not None and end is not None and image is not None
    return PolicyArchitecture(text, vision, image, start, end, tie_word_embeddings=True)


# ---- the experts ---------------------------------------------------------------------------------------------


class LoopbackExperts:
    """A `CallRunner` that posts every call to the expert server."""

    def __init__(self, port: int):
        self._client = AsyncExpertClient(port)

    def resolve(self, expert: str, skill: str) -> Pair | str:
        return Pair(expert, skill)

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        start = time.monotonic()
        text = await self._client.ask(call.query)
        return Observation(text, Status.OK, time.monotonic() - start)

    def shunned(self) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        self._client.close()


# ---- the engine ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One call of the decode program; times are those of `time.monotonic`."""

    start: float
    end: float
    written: np.ndarray  # int32 [S]: tokens of each lane

    @property
    def tokens(self) -> int:
        return int(self.written.sum())


class PacedExchange(Exchange):
    """The exchange behind a device that decodes: its callback begins when the chunk before it is over.

    What the host does meanwhile costs nothing, as with any device that programs are queued for.

    Attributes:
      free_at: when the device has done its last chunk, as `time.monotonic` tells it.
    """

    free_at = 0.0

    def serve(self, *given: Any) -> tuple[Orders, np.ndarray]:
        time.sleep(max(0.0, self.free_at - time.monotonic() - _LATE))
        while time.monotonic() < self.free_at:
            time.sleep(0)  # others may run
        return super().serve(*given)


class PacedEngine(Engine):
    """An engine whose decode program takes `step_seconds` for each of its steps.

    The true program runs; the exchange waits for what is left of its time. Where it took longer than it may, it stays
    longer.

    Attributes:
      chunks: every call of it.
    """

    exchange: PacedExchange

    def __init__(
        self,
        graph: nnx.GraphDef,
        mesh: Mesh,
        prompts: Prompts,
        exchange: PacedExchange,
        config: EngineConfig,
        step_seconds: float,
    ):
        super().__init__(graph, mesh, prompts, exchange, config)
        self.step_seconds = step_seconds
        self.chunks: list[Chunk] = []

    def _compile(self, params: nnx.State, sizes: RolloutSizes) -> Compiled:
        compiled = super()._compile(params, sizes)
        programs = dataclasses.replace(compiled.programs, decode=self._paced(compiled.programs.decode))
        return dataclasses.replace(compiled, programs=programs)

    def _paced(self, decode: Callable[..., Lanes]) -> Callable[..., Lanes]:
        def paced(weights: nnx.State, groups: Any, lanes: Lanes, *rest: Any) -> Lanes:
            start = time.monotonic()
            before = np.array(lanes.written)  # waits for what reads observations, which is not counted on any side
            lanes = decode(weights, groups, lanes, *rest)
            written = (np.asarray(lanes.written) - before)[0]
            self.exchange.free_at = max(time.monotonic(), start + int(written.max()) * self.step_seconds)
            self.chunks.append(Chunk(start, self.exchange.free_at, written))
            return lanes

        return paced


class ScriptedRollouts:
    """Rollouts of traces with so many members a group, by one engine.

    Args:
      config: `room` and `turn_budget` must hold the longest episode and turn.
    """

    def __init__(self, tokens: Tokens, port: int, config: EngineConfig, members: int, step_seconds: float):
        self.tokens, self.config, self.members = tokens, config, members
        experts = LoopbackExperts(port)
        self.dispatcher = Dispatcher(experts)
        episode = EpisodeConfig(
            max_calls=MAX_CALLS,
            observation_tokens=64,
            observation_multiple=1,
            deadline=3600.0,
            turn_budget=config.turn_budget,
            room=config.room,
        )
        self.exchange = PacedExchange(tokens, experts, self.dispatcher, episode)
        self._prompts = Prompts(tokens, architecture(tokens), "the", PromptConfig((_PREFIX,), (1,), 0, 1, 1))
        graph, _ = self._policy(np.zeros((1, config.room), np.float32))
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        self.engine = PacedEngine(graph, mesh, self._prompts, self.exchange, config, step_seconds)

    def close(self) -> None:
        self.dispatcher.close()

    def run(self, trace: Trace) -> float:
        """All episodes of a trace; seconds from the call of `Engine.rollout` to its return.

        Raises:
          MismatchError: an episode is not the scripted one.
        """
        (_, params), tasks = self._policy(self.scripts(trace)), make_tasks(trace)
        start = time.perf_counter()
        rollout = self.engine.rollout(params, tasks, len(tasks), self.members, seed=_SEED, step=0, greedy=True)
        seconds = time.perf_counter() - start
        check_episodes([member for group in rollout.trajectories for member in group], trace)
        return seconds

    def session(self, trace: Trace, groups: int) -> tuple[Session, list[GroupRecord], nnx.State]:
        """A session with room for so many groups at a time, to which all groups of a trace are submitted."""
        (_, params), tasks = self._policy(self.scripts(trace)), make_tasks(trace)
        session = self.engine.session(params, groups, self.members, _PREFIX, greedy=True)
        keys = [[lane_key(_SEED, 0, task.id, m) for m in range(self.members)] for task in tasks]
        return session, session.submit(tasks, self._prompts.batch(tasks), keys, len(tasks)), params

    def _policy(self, scripts: np.ndarray) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(ScriptedPolicy(self.tokens, scripts, self.members), nnx.Param)

    def scripts(self, trace: Trace) -> np.ndarray:
        """What every member's tokens are, float32 `[groups * members, R]`."""
        scripts = np.zeros((len(trace.episodes), self.config.room), np.float32)
        for script, episode in zip(scripts, trace.episodes, strict=True):
            endings = [*(_CALL.format(call_name(number)) for number in episode.calls), _ANSWER]
            at = 0
            for turn, (ending, tokens) in enumerate(zip(endings, episode.turns, strict=True), start=1):
                script[at : at + tokens] = write_turn(self.tokens.encode, ending, tokens)
                said = self.exchange.observation_ids(Observation(OBSERVATION, Status.OK), last=turn >= MAX_CALLS)
                at += tokens + len(said)
        return scripts


def make_tasks(trace: Trace) -> list[Task]:
    names = [task_name(group) for group in range(len(trace.groups))]
    return [Task(name, f"{name} shows", (), ("done",), "scripted") for name in names]


def check_episodes(trajectories: list[Trajectory], trace: Trace) -> None:
    """Compares what trajectories wrote and asked with their scripts.

    Raises:
      MismatchError: an episode is not the scripted one.
    """
    for trajectory, episode in zip(trajectories, trace.episodes, strict=True):
        asked = [call.query for call, observation in trajectory.calls if observation.text == OBSERVATION]
        found = asked, sum(trajectory.authored), trajectory.answer
        wanted = [call_name(number) for number in episode.calls], sum(episode.turns), "done"
        if found != wanted:
            raise MismatchError(
                f"member {trajectory.member} of {trajectory.task.id} asked, wrote and answered {found}, not {wanted}"
            )
