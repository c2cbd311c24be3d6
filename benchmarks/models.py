"""The same Qwen3-VL twice: our policy and transformers' model, with the same weights, prompts and outputs.

Everything that benchmarks need to know of either side's interfaces is in here. Both sides start from ids and from an
image's patches; both make positions and interpolation weights within the time that is measured.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks.pairs import timed
from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params
from maestro_jax.policy import preprocess
from maestro_jax.policy.attention.interface import suited_to
from maestro_jax.policy.config import PolicyArchitecture, TextConfig, VisionConfig
from maestro_jax.policy.hf_export import hf_config
from maestro_jax.policy.huggingface import counterparts
from maestro_jax.policy.model import Policy, PrefixBatch
from maestro_jax.policy.prompts import collate_prompts
from maestro_jax.rollout.decode import DecodeConfig, StopTables
from maestro_jax.rollout.moves import LaneStarts
from maestro_jax.rollout.programs import RolloutPrograms, rollout_programs
from maestro_jax.rollout.state import Lane, RolloutSizes

_LM_HEAD = "lm_head.weight"  # tied with the embedding

# The smallest tower, for policies that read text only: it sees one empty patch a group.
TOWER = VisionConfig(
    depth=1,
    hidden_size=4,
    intermediate_size=4,
    num_heads=1,
    in_channels=1,
    patch_size=1,
    temporal_patch_size=1,
    spatial_merge_size=1,
    out_hidden_size=0,  # the decoder's width
    num_position_embeddings=1,
    deepstack_visual_indexes=(),
)
SPECIAL = 3  # ids at the end of the vocabulary that stand for images, and no text has


def text_only(text: TextConfig, tied: bool) -> PolicyArchitecture:
    """A decoder under the smallest tower."""
    vision = dataclasses.replace(TOWER, out_hidden_size=text.hidden_size)
    first = text.vocab_size - SPECIAL
    return PolicyArchitecture(text, vision, first, first + 1, first + 2, tied)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt with its images."""

    ids: np.ndarray  # int32 [T], with one image token per merged patch
    root: int  # how many of them stand in front of what differs between tasks
    images: tuple[preprocess.PreparedImage, ...]

    @property
    def shape(self) -> dict[str, Any]:
        """Lengths in tokens, images in patches."""
        patches = {"patches": [[image.rows, image.columns] for image in self.images]} if self.images else {}
        return {"prompt": len(self.ids), "root": self.root} | patches


@dataclasses.dataclass(frozen=True)
class Generated:
    """What G members wrote, and the seconds it took."""

    tokens: np.ndarray  # int32 [G, R]
    prefill_seconds: float
    decode_seconds: float
    logprobs: np.ndarray | None = None  # float32 [G, R]
    margin: float | None = None  # smallest distance of a chosen logit to the second best


def random_prompt(architecture: PolicyArchitecture, length: int, root: int, size: tuple[int, int], seed: int) -> Prompt:
    """Random text around an image of noise of `size` (height, width); `length` tokens in all."""
    rng, vision = np.random.default_rng(seed), architecture.vision
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    image = preprocess.prepare_image(pixels, vision, 1, math.prod(size))
    picture = [architecture.image_token_id] * image.tokens(vision.spatial_merge_size)
    framed = [architecture.vision_start_token_id, *picture, architecture.vision_end_token_id]
    text = rng.integers(0, architecture.vision_start_token_id, length - len(framed))  # ids below the special ones
    return Prompt(np.concatenate([text[:root], framed, text[root:]]).astype(np.int32), root, (image,))


def random_text(architecture: PolicyArchitecture, length: int, root: int, seed: int) -> Prompt:
    """Random text of `length` tokens in all."""
    ids = np.random.default_rng(seed).integers(0, architecture.image_token_id, length)  # the first special one
    return Prompt(ids.astype(np.int32), root, ())


# ---- ours --------------------------------------------------------------------------------------------------


class OurPolicy:
    """Our policy with random fp32 weights on one device."""

    def __init__(self, architecture: PolicyArchitecture, seed: int):
        self.architecture = architecture
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        make = lambda: Policy(architecture, nnx.Rngs(seed), attention=suited_to("cpu"))  # noqa: E731
        # Waited for: initialising takes three times the weights' memory, a second model is to come after it.
        self.graph, self.params = jax.block_until_ready(init_params(make, self.mesh, ShardingRules()))

    def compile(self, function: Callable, *args: Any, donate: tuple[int, ...] = ()) -> Callable:
        """`function(policy, *args)` compiled ahead of time, as a function of args like these (shapes are enough)."""
        with jax.set_mesh(self.mesh):
            program = jax.jit(self._on_params(function), donate_argnums=donate).lower(self.params, *args).compile()
        return lambda *args: jax.block_until_ready(program(self.params, *args))

    def shapes(self, function: Callable, *args: Any) -> Any:
        """What `function(policy, *args)` returns, as shapes and dtypes."""
        return jax.eval_shape(self._on_params(function), self.params, *args)

    def _on_params(self, function: Callable) -> Callable:
        return lambda params, *args: function(nnx.merge(self.graph, params), *args)

    def batch(self, prompt: Prompt) -> PrefixBatch:
        """The prompt as one group, with everything that is computed on the host."""
        root, row = prompt.ids[: prompt.root], prompt.ids[prompt.root :]
        slots, patches = max(len(prompt.images), 1), self.architecture.vision.spatial_merge_size**2
        patches = max([patches, *(len(image.patches) for image in prompt.images)])
        return collate_prompts(root, [row], [prompt.images], self.architecture, len(row), slots, patches)


@functools.lru_cache(maxsize=1)
def random_policy(architecture: PolicyArchitecture, seed: int) -> OurPolicy:
    """The last policy again where the same is asked for: making one takes seconds."""
    return OurPolicy(architecture, seed)


class OurForward:
    """Logits `[V]` after a prompt."""

    def __init__(self, policy: OurPolicy, prompt: Prompt):
        self.policy, self.prompt, self.shape = policy, prompt, {"shape": prompt.shape}
        self.compile_seconds, self._program = timed(lambda: policy.compile(_last_logits, policy.batch(prompt)))

    def __call__(self) -> np.ndarray:
        return np.asarray(self._program(self.policy.batch(self.prompt)))


def _last_logits(policy: Policy, batch: PrefixBatch) -> jax.Array:
    _, last = policy.encode_prompts(batch, policy.encode_root(batch.root))
    return policy.logits(last)[0]


class OurLanes:
    """The members of one group in lanes of their own: the programs of the rollout engine, without its exchange.

    A turn is so many tokens for everybody, greedily chosen. Every method returns when its results are ready; the
    first calls compile.

    Args:
      turn: tokens, a program call.
      room: most tokens of a member, turns and observations together.
    """

    def __init__(self, policy: OurPolicy, prompt: Prompt, members: int, turn: int, room: int):
        self.policy, self.prompt, self.members = policy, prompt, members
        sizes = RolloutSizes(
            shards=1,
            lanes=members,
            groups=1,
            members=members,
            prefix=len(prompt.ids) - prompt.root,
            room=room,
            turn_budget=turn,
            pages=0,
            append_rows=members,
            prefill_groups=1,
        )
        self._programs = _programs(policy.graph, sizes, turn)
        self._tables = _endless(policy.architecture.text.vocab_size)

    def begin(self, params: nnx.State) -> None:
        """Prefills the prompt, once for all members, and gives them lanes; positions and masks are made on the host."""
        programs, batch = self._programs, self.policy.batch(self.prompt)
        with jax.set_mesh(self.policy.mesh):
            self.weights = programs.weights(params)
            groups, lanes, _ = programs.open(params, batch.root)
            self._groups = programs.prefill(params, groups, batch, np.zeros((1, 1), np.int32))
            self._lanes = jax.block_until_ready(programs.assign(self._groups, lanes, self._starts()))

    def decode(self) -> None:
        """A turn of every member."""
        args = (self.weights, self._groups, self._lanes, self._tables, np.float32(0))
        with jax.set_mesh(self.policy.mesh):
            self._lanes = jax.block_until_ready(self._programs.decode(*args))

    def turn(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 `[G, turn]` of the last turn, and their log-probabilities."""
        return np.asarray(self._lanes.tokens[0]), np.asarray(self._lanes.logprobs[0])

    def tell(self, observations: np.ndarray) -> None:
        """Prefills an observation behind every member's tokens: ids int32 `[G, O]`."""
        everybody, lengths = np.arange(self.members, dtype=np.int32), np.full(self.members, observations.shape[1])
        told = everybody[None], observations[None], lengths[None].astype(np.int32)
        with jax.set_mesh(self.policy.mesh):
            self._lanes = jax.block_until_ready(self._programs.append(self.weights, self._groups, self._lanes, *told))

    def _starts(self) -> LaneStarts:
        lanes = (1, self.members)
        zeros = jnp.zeros(lanes, jnp.int32)
        return LaneStarts(
            changed=jnp.ones(lanes, jnp.int32),
            status=jnp.full(lanes, Lane.DECODING, jnp.int32),
            member_slot=jnp.arange(self.members, dtype=jnp.int32)[None],
            length=zeros,
            turn=zeros,
            keys=jnp.zeros((*lanes, 2), jnp.uint32),
        )


@functools.lru_cache(maxsize=1)
def _programs(graph: nnx.GraphDef, sizes: RolloutSizes, turn: int) -> RolloutPrograms:
    """The last programs again where the same are asked for: they compile for seconds."""
    return rollout_programs(graph, sizes, DecodeConfig(turn, temperature=1.0))


class OurGeneration:
    """Greedy continuations of a prompt by a group's members: a prefill, then one program for all tokens.

    Args:
      room: tokens that a member's cache has room for, at least `new_tokens`.
    """

    def __init__(self, policy: OurPolicy, prompt: Prompt, members: int, new_tokens: int, room: int):
        self.policy = policy
        self.shape = {"shape": prompt.shape | {"members": members, "new_tokens": new_tokens, "room": room}}
        self._lanes = OurLanes(policy, prompt, members, new_tokens, room)
        self.compile_seconds, _ = timed(self)

    def __call__(self) -> Generated:
        prefill_seconds, _ = timed(lambda: self._lanes.begin(self.policy.params))
        decode_seconds, _ = timed(self._lanes.decode)
        tokens, logprobs = self._lanes.turn()
        return Generated(tokens, prefill_seconds, decode_seconds, logprobs)


def _endless(vocabulary: int) -> StopTables:
    """One state that every token leads back to: nothing ends a turn but its budget."""
    return StopTables(jnp.zeros((1, vocabulary), jnp.int32), jnp.zeros((1,), jnp.int32), jnp.int32(-1))


# ---- theirs ------------------------------------------------------------------------------------------------


def transformers_model(policy: OurPolicy) -> Any:
    """transformers' model with our weights; attention is what it picks itself (sdpa)."""
    config = Qwen3VLConfig(**hf_config(policy.architecture, "float32", None))
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ours = {name.removesuffix("/value"): leaf for name, leaf in named_leaves(policy.params).items()}
    table = counterparts({name: leaf.shape for name, leaf in ours.items()}, policy.architecture.vision.patch_shape)
    # Copied one by one into tensors of its own layout: a transposed view would be slower for it than its own.
    left = dict(model.state_dict())
    for name, part in table.items():
        for tensor_name, tensor in part.to_hf(np.asarray(ours[name])).items():
            left.pop(tensor_name).copy_(torch.tensor(tensor))
    if left.keys() - {_LM_HEAD}:
        raise ValueError(f"transformers has parameters that the policy lacks: {sorted(left)}")
    return model


def _inputs(prompt: Prompt, image_token: int, rows: int) -> dict[str, torch.Tensor]:
    """What transformers' processor would hand over for equal rows."""
    ids = torch.tensor(prompt.ids)[None].long().repeat(rows, 1)
    text = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image_token).int(),
    }
    if not prompt.images:
        return text
    patches = torch.tensor(np.concatenate([image.patches for image in prompt.images]))
    grid = torch.tensor([[1, image.rows, image.columns] for image in prompt.images])
    return text | {"pixel_values": patches.repeat(rows, 1), "image_grid_thw": grid.repeat(rows, 1)}


class TheirForward:
    """Logits `[V]` after a prompt."""

    def __init__(self, model: Any, prompt: Prompt):
        self.model = model
        self._inputs = _inputs(prompt, model.config.image_token_id, 1)

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        return self.model(**self._inputs, use_cache=False, logits_to_keep=1).logits[0, -1].numpy()


@torch.inference_mode()
def their_logprobs(model: Any, prompt: Prompt, start: int) -> np.ndarray:
    """Log-probabilities float32 `[T - start]` of a prompt's tokens from `start` on, from one forward over all of it."""
    logits = model(**_inputs(prompt, model.config.image_token_id, 1), use_cache=False).logits[0, start - 1 : -1]
    targets = torch.tensor(prompt.ids[start:]).long()[:, None]
    return torch.gather(torch.log_softmax(logits, dim=-1), -1, targets)[:, 0].numpy()


class TheirGeneration:
    """Greedy continuations of a prompt by `generate`: the prompt stands in as many rows as there are members."""

    def __init__(self, model: Any, prompt: Prompt, members: int, new_tokens: int):
        self.model = model
        self._inputs = _inputs(prompt, model.config.image_token_id, members)
        self._limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    @torch.inference_mode()
    def __call__(self, keep_logits: bool = False) -> Generated:
        """One run; only one that keeps its logits tells log-probabilities and margin."""
        clock, start = _Clock(), time.perf_counter()
        out = self.model.generate(
            **self._inputs,
            **self._limits,
            do_sample=False,
            use_cache=True,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=keep_logits,
        )
        _, first, *_, last = clock.times
        tokens = out.sequences[:, self._inputs["input_ids"].shape[1] :]
        logprobs, margin = _judge(torch.stack(out.logits, dim=1), tokens) if keep_logits else (None, None)
        return Generated(tokens.int().numpy(), first - start, last - first, logprobs, margin)

    @torch.inference_mode()
    def forward(self) -> None:
        """One forward over all rows that keeps keys and values: what `generate` does before its first token."""
        self.model(**self._inputs, use_cache=True, logits_to_keep=1)


class _Clock:
    """A streamer that notes when `generate` hands over the prompt and each token of the members."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        del tokens
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _judge(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[np.ndarray, float]:
    """Log-probabilities `[G, R]` of tokens under `logits [G, R, V]`, and by how much the nearest choice was made."""
    chosen = torch.gather(logits, -1, tokens[..., None])[..., 0]
    best, second = torch.topk(logits, 2).values.unbind(-1)
    return (chosen - torch.logsumexp(logits, dim=-1)).numpy(), float((best - second).min())
