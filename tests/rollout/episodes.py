"""What the proofs of the engine share: a small policy that speaks, experts that dawdle, tasks, and an engine of them.

Its weights are random, but some words of its vocabulary are whole calls and answers, and those are louder than the
others: so episodes have several turns, real calls, and every way in which a turn can end, without any training.
"""

import asyncio
import contextlib
import copy
import dataclasses
import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from tokenizers import AddedToken

from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_shardings
from maestro_jax.policy.model import Policy
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import END_OF_TURN, SPECIAL_TOKENS, Tokens, load_tokens, train_tokens
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Engine, EngineConfig, Rollout
from maestro_jax.rollout.exchange import Counts, EpisodeConfig, Exchange, observation_frames
from maestro_jax.rollout.protocol import opened_thought
from maestro_jax.rollout.session import Session
from maestro_jax.types import Call, Observation, Status, Task, Usage
from tests.policy import reference
from tests.rollout import toy

# ---- vocabulary --------------------------------------------------------------------------------------------

CALL_WORDS = [f"<search> {expert}@@{skill}: {expert.lower()}</search>" for expert, skill in toy.PAIRS]
# The first of these is always followed by the second, so that a tag is cut by the vocabulary.
CUT_CALL = ("<search> Glyph@@Reading: cut</sea", "rch> so")
ANSWER_WORD = "<answer> seven </answer>"
WORDS = (*CALL_WORDS, *CUT_CALL, ANSWER_WORD)
WHOLE_TURNS = (*CALL_WORDS, ANSWER_WORD)
FILLER = " ."  # of observations; a word of its own, not one that is learned: what the policy says hangs on the ids
VOCABULARY = 384  # rows of the tables; some belong to no token, as in the published checkpoint


def make_tokens(directory: Path, before: str = "") -> Tokens:
    """The tokenizer; `before` stands in every word that is a whole turn, in front of its call or answer."""
    frames = [frame.replace(FILLER, "") for frame in observation_frames()]
    texts = [*toy.CALLS, toy.ANSWER, "how many 0 1 2 3 4 5 6 7 8 9?", *frames] * 50
    tokens = train_tokens(texts, VOCABULARY - 16 - len(WORDS), directory)
    tokenizer: Any = tokens.tokenizer
    words = [f"{before}{word}" if word in WHOLE_TURNS else word for word in (*WORDS, FILLER)]
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer.save_pretrained(str(directory))
    return load_tokens(directory)


# ---- policy ------------------------------------------------------------------------------------------------

LOUDNESS = {ANSWER_WORD: 1.9, END_OF_TURN: 1.3} | dict.fromkeys((*CALL_WORDS, CUT_CALL[0]), 1.8)


def model_config() -> dict[str, Any]:
    """The toy Qwen3-VL with a head of its own: a tied one would mostly repeat the last token."""
    found = copy.deepcopy(reference.CONFIG)
    found["text_config"] |= {"vocab_size": VOCABULARY}
    images = {name: SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    images |= {name: SPECIAL_TOKENS.index(f"<|{name}_pad|>") for name in ("image", "video")}
    return found | {f"{name}_token_id": token for name, token in images.items()} | {"tie_word_embeddings": False}


def torch_model(tokens: Tokens, before: str = "") -> Any:
    """transformers' model in fp32, random but for the words that it likes to write; `before` as of `make_tokens`."""
    import torch

    model = reference.reference_model(model_config()).float()
    head, table = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        for word, loudness in LOUDNESS.items():
            head[tokens.encode(f"{before}{word}" if word in WHOLE_TURNS else word)[0]] *= loudness
        cut, rest = (tokens.encode(word)[0] for word in CUT_CALL)
        head[rest] = 2 * table[cut]
        table[cut] *= 20
        head[tokens.image] = 0  # greedy decoding must not open an image
    return model


@dataclasses.dataclass(frozen=True)
class Talker:
    """A policy that speaks, and what it writes in; made from files, so that other processes can have the same."""

    directory: Path
    tokens: Tokens
    policy: Policy


def write_talker(directory: Path) -> None:
    """Writes the tokenizer and the parameters of `torch_model`."""
    model = torch_model(make_tokens(directory))
    np.savez(directory / _PARAMS, **reference.as_params(reference.weights_of(model), model_config()))


def read_talker(directory: Path) -> Talker:
    with np.load(directory / _PARAMS) as params:
        policy = reference.load(dict(params), model_config())
    return Talker(directory, load_tokens(directory), policy)


_PARAMS = "params.npz"


# ---- tasks and experts -------------------------------------------------------------------------------------

# No image; one that is wide; two that are not square.
IMAGE_SIZES: tuple[tuple[tuple[int, int], ...], ...] = ((), ((96, 32),), ((32, 96), (64, 32)))


def task(number: int) -> Task:
    return Task(
        f"toy/{number:03d}",
        f"how many {number}?",
        tuple(_png(size, seed) for seed, size in enumerate(IMAGE_SIZES[number % 3], start=number)),
        ("seven",),
        "counting",
    )


def _png(size: tuple[int, int], seed: int) -> bytes:
    """Noise of `size` (width, height)."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_prompts(talker: Talker, left_out: str = "") -> Prompts:
    limits = PromptConfig(
        prefix_buckets=(48,), image_buckets=(12,), images_per_task=2, min_pixels=32 * 32, max_pixels=32 * 96
    )
    return Prompts(talker.tokens, talker.policy.architecture, "You may call.", limits, left_out)


def reply(question: str, query: str) -> str:
    """What every expert says: a number that only this question and query have."""
    return f"{query} {draw(question, query) % 1000}"


def draw(*parts: object) -> int:
    """A number below 2**64 that depends on `parts` only."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


class NumberedDispatcher(Dispatcher):
    """Lets every query tell whose it is: greedy members of a group write the same, and should hear different things."""

    def submit(self, ticket: int, call: Call, *told: Any) -> None:
        super().submit(ticket, numbered(call, ticket & 0xFFFFFFFF), *told)


def numbered(call: Call, trajectory: int) -> Call:
    return dataclasses.replace(call, query=f"{call.query} {trajectory}")


class Experts:
    """A `CallRunner`: every call is answered by `reply`, after up to `longest` seconds."""

    def __init__(self, longest: float, seed: int = 0):
        self.longest = longest
        self.latency = random.Random(seed)
        self.answered: list[str] = []  # questions, in the order of the replies

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        await asyncio.sleep(self.latency.uniform(0, self.longest))
        self.answered.append(question)
        return Observation(reply(question, call.query), Status.OK, usage=Usage(price=0.25))

    async def close(self) -> None:
        pass


# ---- engine ------------------------------------------------------------------------------------------------

EPISODE = EpisodeConfig(
    max_calls=3, observation_tokens=12, observation_multiple=4, deadline=30.0, turn_budget=14, room=112
)


ENGINE = EngineConfig(
    lanes=0,
    decode_chunk=8,
    turn_budget=EPISODE.turn_budget,
    room=EPISODE.room,
    append_rows=4,
    prefill_groups=0,
    parked_tokens=0,
    parked_on_host=0,
    temperature=0.7,
)


def one_device() -> Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


class CountingEngine(Engine):
    """Remembers what its last session did, round by round."""

    rounds: list[Counts]

    def session(self, *args: Any) -> Session:
        made = super().session(*args)
        self.rounds, run = [], made.run

        def counted(*args: Any, **options: Any) -> Iterator[Counts]:
            for counts in run(*args, **options):
                self.rounds.append(counts)
                yield counts

        made.run = counted  # type: ignore[method-assign]
        return made


@dataclasses.dataclass(frozen=True)
class Runner:
    """An engine with the parameters that it decodes with."""

    engine: CountingEngine
    params: nnx.State

    def __call__(self, tasks: Sequence[Task], members: int, greedy: bool = False, step: int = 1) -> Rollout:
        return self.engine.rollout(self.params, tasks, len(tasks), members, seed=0, step=step, greedy=greedy)

    def total(self, name: str) -> int:
        """A field of `Counts`, summed over the rounds of the last rollout."""
        return sum(getattr(counts, name) for counts in self.engine.rounds)


@contextlib.contextmanager
def engine(
    talker: Talker,
    dispatcher: Dispatcher,
    config: EngineConfig,
    mesh: Mesh | None = None,
    episode: EpisodeConfig = EPISODE,
) -> Iterator[Runner]:
    """An engine with the policy's parameters on its mesh; closes the dispatcher at the end."""
    mesh = mesh or one_device()
    graph, params = nnx.split(talker.policy, nnx.Param)
    shardings = param_shardings(params, mesh, ShardingRules())
    params = jax.device_put(jax.tree.map(np.asarray, params), shardings)  # from the host: a mesh may span processes
    with contextlib.closing(dispatcher):
        exchange = Exchange(talker.tokens, toy.Names(), dispatcher, episode)
        left_out = opened_thought(talker.tokens.header) if episode.earlier_thoughts == "drop" else ""
        yield Runner(CountingEngine(graph, mesh, make_prompts(talker, left_out), exchange, config), params)


@dataclasses.dataclass(frozen=True)
class Episode:
    """What one trajectory holds, without times."""

    tokens: list[int]
    logprobs: list[float]
    authored: list[bool]


At = tuple[int, int]  # group and member


def episodes(rollout: Rollout) -> dict[At, Episode]:
    members = {(g, m): t for g, group in enumerate(rollout.trajectories) for m, t in enumerate(group)}
    return {at: Episode(t.tokens, t.logprobs, t.authored) for at, t in members.items()}


def assert_same(found: dict[At, Episode], wanted: dict[At, Episode], tolerance: float) -> None:
    """The same tokens of the same authors, and log-probabilities that differ by rounding only."""
    assert found.keys() == wanted.keys()
    for at, episode in wanted.items():
        assert found[at].tokens == episode.tokens, at
        assert found[at].authored == episode.authored, at
        np.testing.assert_allclose(found[at].logprobs, episode.logprobs, atol=tolerance, rtol=0, err_msg=str(at))
