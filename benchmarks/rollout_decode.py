"""What the policy computes in a rollout: the measures of `benchmarks/rollout.py` that need no experts.

| measure | what is compared |
|---|---|
| D1 | a group's members continue one long prompt: transformers' `generate` against prefill and decode programs |
| D1_prefill, D1_decode | its parts: up to the first token, and a step of all members |
| D2 | several turns with observations between: `generate` on the whole conversation, every turn, against kept KV |
| W1 | bytes copied between an update and the decoding that follows it |
| N1 | log-probabilities that a rollout recorded, against transformers' forward and against the trainer's |

All in fp32 with the same weights and ids on both sides. Tokens are compared before anything is timed.
"""

import dataclasses
import io
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from PIL import Image

from benchmarks import group_update, models, pairs, policy
from benchmarks.group_update import OurUpdate
from benchmarks.models import OurGeneration, OurLanes, OurPolicy, Prompt, TheirGeneration
from benchmarks.pairs import Figure, MismatchError, Result
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch, batch_shardings, make_reference
from maestro_jax.images import decode_image
from maestro_jax.observe.progress import Progress
from maestro_jax.policy import preprocess
from maestro_jax.policy.config import PolicyArchitecture, TextConfig, VisionConfig
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import SPECIAL_TOKENS, Tokens, train_tokens
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Engine, EngineConfig, Rollout
from maestro_jax.rollout.exchange import EpisodeConfig, Exchange, observation_frames
from maestro_jax.rollout.programs import Weights
from maestro_jax.types import Call, Observation, Task

SEED = 0
TOLERANCE = 2e-5  # of log-probabilities: fp32, sums are taken in another order


# ---- D1: a long prompt and a few tokens --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What is computed in D1; lengths in tokens."""

    text: TextConfig
    prompt: int
    root: int  # of the prompt: what all tasks share
    members: int
    new_tokens: int
    room: int  # of a member's cache


# Layers of Qwen3-0.6B: the weights that a step reads are an order of magnitude more than the last cache level holds.
# Heads are not tied, so that greedy decoding does not repeat one token for ever.
LONG_PROMPT = Continuation(
    TextConfig(32_768, 1024, 3072, 3, 16, 8, 128, 1e-6, 1e6, (24, 20, 20)),
    prompt=2048,
    root=256,
    members=8,
    new_tokens=16,
    room=128,
)
TOY_TEXT = TextConfig(64, 32, 96, 1, 4, 2, 16, 1e-6, 1e6, (4, 2, 2))
TOY_PROMPT = Continuation(TOY_TEXT, prompt=24, root=4, members=2, new_tokens=4, room=24)


def run_d1(shape: Continuation, progress: Progress) -> dict[str, Result]:
    """D1 and its parts.

    Raises:
      MismatchError: tokens or log-probabilities of both sides differ.
    """
    progress.phase("D1: compile, first runs", 1)
    ours = models.random_policy(models.text_only(shape.text, tied=False), SEED)
    prompt = models.random_text(ours.architecture, shape.prompt, shape.root, SEED)
    generation = policy.compare_generation(
        OurGeneration(ours, prompt, shape.members, shape.new_tokens, shape.room),
        TheirGeneration(models.transformers_model(ours), prompt, shape.members, shape.new_tokens),
    )
    progress.update(1, generation.figures)
    # Says how much of their prefill is the policy's own work, and not that of `generate` around it.
    forward_seconds, _ = pairs.timed(generation.theirs.forward)
    generation.details.update(
        their_forward_seconds=forward_seconds, text=dataclasses.asdict(shape.text), weights_mib=_mib(ours.params)
    )
    timed = policy.time_generation(generation, "", shape.new_tokens, progress)
    return {"D1": timed["generate"], "D1_prefill": timed["prefill"], "D1_decode": timed["decode"]}


def _mib(params: nnx.State) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20


# ---- D2: turns and observations ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is computed in D2; lengths in tokens."""

    text: TextConfig
    prompt: int
    root: int
    members: int
    turns: int
    turn: int  # tokens that the policy writes in a turn
    observation: int  # behind every turn but the last
    room: int

    def observations(self, seed: int) -> np.ndarray:
        """Random ids int32 `[turns - 1, G, observation]`: every member is told something else."""
        shape = (self.turns - 1, self.members, self.observation)
        ids = np.random.default_rng(seed).integers(0, self.text.vocab_size - models.SPECIAL, shape)
        return ids.astype(np.int32)


FOUR_TURNS = Conversation(
    TextConfig(8192, 512, 1536, 3, 8, 4, 64, 1e-6, 1e6, (12, 10, 10)),
    prompt=2048,
    root=256,
    members=8,
    turns=4,
    turn=16,
    observation=32,
    room=256,
)
TOY_TURNS = Conversation(TOY_TEXT, prompt=24, root=4, members=2, turns=3, turn=4, observation=3, room=24)


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A whole conversation."""

    turns: np.ndarray  # int32 [turns, G, turn]
    prefilled: int  # tokens that ran through the policy, those that it wrote in the turn apart


class OurConversation:
    """Kept keys and values: the prompt is prefilled once, then each observation, behind what its member has."""

    def __init__(self, ours: OurPolicy, prompt: Prompt, shape: Conversation):
        self._params, self._prefilled = ours.params, len(prompt.ids)
        self._observations = shape.observations(SEED)
        self._lanes = OurLanes(ours, prompt, shape.members, shape.turn, shape.room)

    def __call__(self) -> Spoken:
        lanes, turns = self._lanes, []
        lanes.begin(self._params)
        lanes.decode()
        turns.append(lanes.turn()[0])
        for told in self._observations:
            lanes.tell(told)
            lanes.decode()
            turns.append(lanes.turn()[0])
        return Spoken(np.stack(turns), self._prefilled + self._observations.size)


class TheirConversation:
    """Every turn is a `generate` on all of the conversation so far, as loops around `generate` do it."""

    def __init__(self, model: Any, prompt: Prompt, shape: Conversation):
        self._model, self._prompt = model, torch.tensor(prompt.ids)[None].long().repeat(shape.members, 1)
        self._observations = torch.tensor(shape.observations(SEED)).long()
        self._limits = {"max_new_tokens": shape.turn, "min_new_tokens": shape.turn}

    @torch.inference_mode()
    def __call__(self) -> Spoken:
        said, prefilled, turns = self._prompt, self._prompt.numel(), []
        for told in (*self._observations, None):
            out = self._model.generate(
                input_ids=said,
                attention_mask=torch.ones_like(said),
                mm_token_type_ids=torch.zeros_like(said).int(),
                do_sample=False,
                use_cache=True,
                **self._limits,
            )
            turns.append(out[:, said.shape[1] :])
            if told is not None:
                said = torch.cat([out, told], dim=1)
                prefilled += said.numel()
        return Spoken(torch.stack(turns).int().numpy(), prefilled)


OUR_CONVERSATION = "the prompt once for all members, then turns of every member and prefills of its observations"
THEIR_CONVERSATION = (
    "generate on the whole conversation, all members in one batch, once a turn, KV cache within the turn"
)


def run_d2(shape: Conversation, progress: Progress) -> dict[str, Result]:
    """D2.

    Raises:
      MismatchError: both sides wrote something else.
    """
    progress.phase("D2: compile, first runs", 3)
    ours = models.random_policy(models.text_only(shape.text, tied=False), SEED)
    prompt = models.random_text(ours.architecture, shape.prompt, shape.root, SEED)
    sides = OurConversation(ours, prompt, shape), TheirConversation(models.transformers_model(ours), prompt, shape)
    compile_seconds, found = pairs.timed(sides[0])
    progress.update(1, {})
    their_seconds, wanted = pairs.timed(sides[1])
    progress.update(2, {})
    check_conversation(found, wanted)
    our_seconds, _ = pairs.timed(sides[0])
    progress.update(3, {"ours": our_seconds, "theirs": their_seconds})
    prefilled = {"ours": found.prefilled, "theirs": wanted.prefilled, "ratio": wanted.prefilled / found.prefilled}
    details = {
        "shape": dataclasses.asdict(shape),
        "prefilled_tokens": prefilled,
        "compile_seconds": compile_seconds,
        "warm_up_seconds": [our_seconds, their_seconds],
    }

    def seconds(side: OurConversation | TheirConversation) -> dict[str, float]:
        return {"D2": pairs.timed(side)[0]}

    timed = pairs.interleave(
        lambda: seconds(sides[0]), lambda: seconds(sides[1]), pairs.PAIRS.value, "D2: conversations", progress
    )
    return {"D2": Result(OUR_CONVERSATION, THEIR_CONVERSATION, timed["D2"], details)}


def check_conversation(found: Spoken, wanted: Spoken) -> None:
    if not np.array_equal(found.turns, wanted.turns):
        turn, member, at = np.argwhere(found.turns != wanted.turns)[0]
        raise MismatchError(
            f"D2: member {member} differs from transformers' in turn {turn} at token {at}; nothing was timed"
        )


# ---- W1: from an update to the next decoding ---------------------------------------------------------------


def run_w1(shape: Conversation, progress: Progress) -> dict[str, Figure]:
    """W1: where parameters lie before and after an update, and in the programs that decode with them.

    Raises:
      MismatchError: decoding with them is not decoding with a copy of them, or not with the updated ones.
    """
    progress.phase("W1", 2)
    ours = models.random_policy(models.text_only(shape.text, tied=False), SEED)
    prompt = models.random_text(ours.architecture, shape.prompt, shape.root, SEED)
    lanes = OurLanes(ours, prompt, shape.members, shape.turn, shape.room)
    learned = group_update.Shape(shape.text, shape.prompt, shape.turn, shape.members, observed=1)
    group = group_update.random_group(learned, SEED)
    update = OurUpdate(ours, group.batch(ours.architecture, shared=True))

    def decode(params: nnx.State) -> np.ndarray:
        """Log-probabilities of the tokens that are written with `params`."""
        lanes.begin(params)
        lanes.decode()
        return lanes.turn()[1]

    earlier, before = decode(update.params), buffers(update.params)
    progress.update(1, {})
    update()
    after, logprobs = buffers(update.params), decode(update.params)
    read = buffers(lanes.weights)
    if not np.array_equal(logprobs, decode(jax.tree.map(fresh_copy, update.params))):
        raise MismatchError("W1: decoding with the update's own buffers is not decoding with a copy of them")
    if np.array_equal(logprobs, earlier):
        raise MismatchError("W1: decoding after an update is decoding as before it")
    details = {
        "parameters_bytes": sum(size for _, size in after),
        "leaves": len(after),
        "bytes_that_the_update_moved": bytes_elsewhere(before, after),
    }
    progress.update(2, {"bytes copied": bytes_elsewhere(after, read)})
    what = "bytes of parameters that decoding reads from another buffer than the one that the update wrote"
    return {"W1": Figure(what, bytes_elsewhere(after, read), "bytes", 0, details)}


def buffers(params: nnx.State | Weights) -> list[tuple[int, int]]:
    """Address and bytes of every parameter."""
    return [(leaf.unsafe_buffer_pointer(), leaf.nbytes) for leaf in jax.tree.leaves(params)]


def bytes_elsewhere(written: Sequence[tuple[int, int]], read: Sequence[tuple[int, int]]) -> int:
    """Bytes of what is read from an address at which nothing of that size was written."""
    return sum(size for address, size in read if (address, size) not in written)


def fresh_copy(leaf: jax.Array) -> jax.Array:
    return jax.device_put(np.array(leaf), leaf.sharding)


# ---- N1: the numbers of a rollout --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Episodes:
    """What is rolled out in N1: a random policy, whose turns are malformed, so that it is told so and goes on."""

    text: TextConfig
    vision: VisionConfig
    images: tuple[tuple[tuple[int, int], ...], ...]  # (height, width) of the images of each task
    members: int
    lanes: int
    turn: int  # tokens
    turns: int

    @property
    def architecture(self) -> PolicyArchitecture:
        image, start, end = (
            SPECIAL_TOKENS.index(f"<|{name}|>") for name in ("image_pad", "vision_start", "vision_end")
        )
        return PolicyArchitecture(self.text, self.vision, image, start, end, tie_word_embeddings=True)

    @property
    def limits(self) -> EpisodeConfig:
        return EpisodeConfig(
            max_calls=self.turns - 1,
            observation_tokens=48,
            observation_multiple=1,
            deadline=60.0,
            turn_budget=self.turn,
            room=self.turns * (self.turn + 64),
        )

    def tasks(self, seed: int) -> list[Task]:
        rng = np.random.default_rng(seed)
        pictures = [
            tuple(_png(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes) for sizes in self.images
        ]
        return [Task(f"n1/{n}", f"how many are there in {n}?", shown, ("1",), "n1") for n, shown in enumerate(pictures)]


VISION = VisionConfig(4, 128, 256, 4, 3, 16, 2, 2, 256, 144, (0, 1, 2))
MIXED_TASKS = Episodes(
    TextConfig(512, 256, 768, 6, 8, 2, 64, 1e-6, 5e6, (12, 10, 10)),
    VISION,
    images=((), ((96, 160),), ((128, 64), (64, 96))),
    members=4,
    lanes=8,
    turn=24,
    turns=3,
)
TOY_TASKS = dataclasses.replace(
    MIXED_TASKS,
    text=TextConfig(512, 48, 96, 2, 4, 2, 16, 1e-6, 5e6, (4, 2, 2)),
    vision=VisionConfig(1, 32, 48, 2, 3, 16, 2, 2, 48, 144, (0,)),
    images=((), ((64, 96), (32, 64))),
    members=2,
    lanes=2,
    turn=8,
    turns=2,
)
SYSTEM = "You may call an expert: <search> Expert@@Skill: query </search> or answer: <answer> text </answer>"
SIDE = 256 * 256  # pixels of an image at most


def run_n1(shape: Episodes, progress: Progress) -> dict[str, Figure]:
    """N1: every token that a policy wrote in episodes with images and observations."""
    progress.phase("N1", 3)
    ours = OurPolicy(shape.architecture, SEED)
    with tempfile.TemporaryDirectory() as directory:
        prompts = make_prompts(
            train_tokens([SYSTEM, *observation_frames()] * 10, shape.text.vocab_size, directory), shape
        )
    tasks = shape.tasks(SEED)
    rollout = roll_out(ours, prompts, tasks, shape)
    progress.update(1, {"tokens": int(rollout.authored.sum())})
    trainer = trainer_logprobs(ours, rollout)
    progress.update(2, {})
    others = {"transformers": transformers_logprobs(ours, rollout, tasks), "trainer": trainer}
    wrote = rollout.authored
    gaps = largest_gaps(rollout.logprobs, wrote, others)
    progress.update(3, gaps)
    details = {
        "largest_gap": gaps,
        "tokens_written": int(wrote.sum()),
        "tokens_told": int(rollout.length.sum() - wrote.sum()),
        "turns": [t.turns for group in rollout.trajectories for t in group],
        "images": [len(task.images) for task in tasks],
        "text": dataclasses.asdict(shape.text),
        "vision": dataclasses.asdict(shape.vision),
    }
    what = "largest gap of log-probabilities: rollout against transformers' log-softmax and the trainer's forward pass"
    return {"N1": Figure(what, max(gaps.values()), "nats", TOLERANCE, details)}


def largest_gaps(recorded: np.ndarray, wrote: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far others' log-probabilities are from the recorded ones at most, where the policy `wrote`; `[B, G, R]`."""
    return {name: float(np.abs(recorded - other)[wrote].max()) for name, other in others.items()}


def make_prompts(tokens: Tokens, shape: Episodes) -> Prompts:
    patches = SIDE // shape.vision.patch_size**2
    limits = PromptConfig(
        prefix_buckets=(256,),
        image_buckets=(patches,),
        images_per_task=max(len(sizes) for sizes in shape.images),
        min_pixels=32 * 32,
        max_pixels=SIDE,
    )
    return Prompts(tokens, shape.architecture, SYSTEM, limits)


def roll_out(ours: OurPolicy, prompts: Prompts, tasks: Sequence[Task], shape: Episodes) -> Rollout:
    """Episodes of the real engine, sampled at temperature 1, with fewer lanes than trajectories."""
    dispatcher = Dispatcher(NoExperts())
    try:
        exchange = Exchange(prompts.tokens, NoNames(), dispatcher, shape.limits)
        limits = EngineConfig(
            lanes=shape.lanes,
            decode_chunk=8,
            turn_budget=shape.limits.turn_budget,
            room=shape.limits.room,
            append_rows=2,
            prefill_groups=1,
            parked_tokens=0,
            parked_on_host=0,
            temperature=1.0,
        )
        engine = Engine(ours.graph, ours.mesh, prompts, exchange, limits)
        return engine.rollout(ours.params, tasks, len(tasks), shape.members, seed=SEED, step=0, greedy=False)
    finally:
        dispatcher.close()


class NoExperts:
    """Nobody to call."""

    async def call(self, call: Call, question: str, images: tuple[bytes, ...], deadline: float) -> Observation:
        raise AssertionError(f"{call} was resolved, though no name resolves")

    def shunned(self) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        pass


class NoNames:
    def resolve(self, expert: str, skill: str) -> str:
        return f"There is no {expert} here."


def trainer_logprobs(ours: OurPolicy, rollout: Rollout) -> np.ndarray:
    """What the update computes of a rollout's tokens `[B, G, R]`, prompt and members in one pass."""
    zeros = np.zeros_like(rollout.logprobs)
    batch = GroupBatch(
        prompts=rollout.prompts,
        tokens=rollout.tokens,
        length=rollout.length,
        mask=rollout.authored,
        old_logprobs=rollout.logprobs,
        reference_logprobs=zeros,
        advantages=zeros[..., 0],
        loss_rows=loss_rows(rollout.authored),
    )
    with jax.set_mesh(ours.mesh):
        compute = make_reference(ours.graph, ours.params, 1.0, group_update.CHUNK, ours.mesh)
        return np.asarray(compute(jax.device_put(batch, batch_shardings(ours.mesh))).reference_logprobs)


def transformers_logprobs(ours: OurPolicy, rollout: Rollout, tasks: Sequence[Task]) -> np.ndarray:
    """What transformers computes of the same tokens `[B, G, R]`, each conversation in a forward pass of its own."""
    model = models.transformers_model(ours)
    found = np.zeros_like(rollout.logprobs)
    for g, task in enumerate(tasks):
        prompt = np.concatenate([rollout.prompts.root, rollout.prompts.tokens[g][rollout.prompts.mask[g]]])
        pixels = [decode_image(image, task.id) for image in task.images]
        images = tuple(preprocess.prepare_image(p, ours.architecture.vision, 32 * 32, SIDE) for p in pixels)
        for m, n in enumerate(rollout.length[g]):
            said = np.concatenate([prompt, rollout.tokens[g, m, :n]])
            found[g, m, :n] = models.their_logprobs(model, Prompt(said, len(prompt), images), len(prompt))
    return found


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
