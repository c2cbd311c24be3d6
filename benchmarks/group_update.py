"""One GRPO update of a group: ours against TRL's, against google-tunix's, and against ours without sharing.

    python -m benchmarks.group_update [--json FILE] [--pairs 7] [--peers DIR] [--smoke]

| measure | theirs |
|---|---|
| U1 | TRL's `GRPOTrainer.compute_loss`, backward pass and optimiser step, as shipped |
| U1_compact | the same, its head computed for completion tokens only (on CUDA its default) |
| U2 | our own update of the same members as G groups of one, so that nothing is shared |
| U3 | google-tunix's actor step with its GRPO loss on its Qwen3 |
| H1 | one log-softmax over the whole vocabulary, against our head alone (`head.py`) |

All hold the same fp32 weights and read the same ids, masks, advantages and old log-probabilities, on the CPU. Loss and
gradient norm of the first update are compared; where they differ nothing is timed. A peer runs in an environment and a
process of its own (`peers/`). Three updates of either side, in which both compile, stand apart from the timed
pairs.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from benchmarks import head, pairs
from benchmarks.models import SPECIAL, OurPolicy, text_only
from benchmarks.pairs import MismatchError, Result
from benchmarks.peers import environment
from benchmarks.peers.worker import Worker
from maestro_jax import command
from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from maestro_jax.grpo.update import (
    GroupBatch,
    UpdateConfig,
    batch_shardings,
    grpo_loss,
    init_train_state,
    make_reference,
    make_train_step,
)
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.config import PolicyArchitecture, TextConfig
from maestro_jax.policy.huggingface import counterparts
from maestro_jax.policy.prompts import collate_prompts

SEED = 0
LOSS_TOLERANCE = 1e-5  # relative; fp32, sums are taken in another order
NORM_TOLERANCE = 1e-4
WARM_UP = 3  # updates; tunix compiles in the first two
CLIP = 0.2
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-6, warmup_steps=0, decay_steps=0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
)
TEMPERATURE = 1.0
CHUNK = 2048  # entries of the vocabulary
# Text only. The tower is frozen; the root is one token, because every policy has one, which the groups of U2 share.
FREEZE = ("vision",)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is computed; lengths in tokens."""

    text: TextConfig
    prefix: int
    member: int
    members: int
    observed: int  # tokens of each member that it did not write, out of the loss

    @property
    def architecture(self) -> PolicyArchitecture:
        return text_only(self.text, tied=True)


# The rotary base is the only one that tunix computes with.
FULL = Shape(TextConfig(8192, 256, 768, 6, 8, 2, 64, 1e-6, 1e6, (12, 10, 10)), 1024, 128, 8, 16)
TOY = Shape(TextConfig(64, 32, 96, 2, 4, 2, 16, 1e-6, 1e6, (4, 2, 2)), 24, 8, 4, 2)


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")  # that is where the peers run
    shape = TOY if pairs.SMOKE.value else FULL
    pairs.use_all_cores()

    with Progress(sys.stderr) as progress, tempfile.TemporaryDirectory() as directory:
        # ---- One group, and everything that is known about it ------------------------------------
        progress.note("weights, group, old log-probabilities")
        policy = OurPolicy(shape.architecture, SEED)
        group = random_group(shape, SEED)
        group = sampled_earlier(group, member_logprobs(policy, group), SEED)
        shared = OurUpdate(policy, group.batch(shape.architecture, shared=True))
        results: dict[str, Result] = {}

        # ---- Sharing off -------------------------------------------------------------------------
        apart = OurUpdate(policy, group.batch(shape.architecture, shared=False))
        results["U2"] = compare("U2", shared, apart, progress, APART, flops_ratios(shape))

        # ---- Peers, one after the other ----------------------------------------------------------
        write_checkpoint(policy, Path(directory))
        arguments = {"checkpoint": directory, "arrays": group.save(Path(directory))}
        for name, peer in PEERS.items():
            with peer.start({**arguments, "optimizer": dataclasses.asdict(OPTIMIZER), "clip": CLIP}, progress) as their:
                results[name] = compare(name, shared, their, progress, peer.what, {})

        # ---- The head alone ----------------------------------------------------------------------
        results["H1"] = head.measure(head.TOY if pairs.SMOKE.value else head.FULL, progress)
    pairs.report(dict(sorted(results.items())))


# ---- the group ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt, its members and what is learned from them."""

    prompt: np.ndarray  # int32 [P]
    members: np.ndarray  # int32 [G, R]
    mask: np.ndarray  # bool [G, R]: tokens in the loss
    advantages: np.ndarray  # float32 [G]
    old_logprobs: np.ndarray  # float32 [G, R]

    def batch(self, architecture: PolicyArchitecture, shared: bool) -> GroupBatch:
        """One group of G members or, not shared, G groups of one member."""
        g, r = self.members.shape
        b = 1 if shared else g
        rows = [self.prompt[1:]] * b
        width = len(self.prompt)  # a bucket, as in a run: the root's token leaves one of padding
        prompts = collate_prompts(self.prompt[:1], rows, [()] * b, architecture, width, per_group=1, patches=1)
        per_token = (a.reshape(b, g // b, r) for a in (self.members, self.mask, self.old_logprobs))
        tokens, mask, old = per_token
        length = np.full((b, g // b), r, np.int32)
        advantages = self.advantages.reshape(b, g // b)
        return GroupBatch(prompts, tokens, length, mask, old, np.zeros_like(old), advantages, loss_rows(mask))

    def save(self, directory: Path) -> str:
        """Writes what peers read; the file's name."""
        path = directory / "group.npz"
        np.savez(
            path,
            prompt_ids=self.prompt,
            completion_ids=self.members,
            loss_mask=self.mask,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
        )
        return str(path)


def random_group(shape: Shape, seed: int) -> Group:
    """Random ids, an observation somewhere in every member, advantages of mean 0 and variance 1."""
    rng = np.random.default_rng(seed)
    g, r = shape.members, shape.member
    ids = rng.integers(1, shape.text.vocab_size - SPECIAL, shape.prefix + g * r).astype(np.int32)  # 0 pads
    start = rng.integers(1, r - shape.observed, (g, 1))
    mask = (np.arange(r) < start) | (np.arange(r) >= start + shape.observed)
    rewards = rng.standard_normal(g)
    advantages = ((rewards - rewards.mean()) / rewards.std()).astype(np.float32)
    return Group(ids[: shape.prefix], ids[shape.prefix :].reshape(g, r), mask, advantages, np.zeros((g, r), np.float32))


def member_logprobs(policy: OurPolicy, group: Group) -> np.ndarray:
    """Log-probabilities `[G, R]` of the members' tokens under the policy."""
    batch = group.batch(policy.architecture, shared=True)
    with jax.set_mesh(policy.mesh):
        reference = make_reference(policy.graph, policy.params, TEMPERATURE, CHUNK, policy.mesh)
        return np.asarray(reference(batch).reference_logprobs[0])


def sampled_earlier(group: Group, logprobs: np.ndarray, seed: int) -> Group:
    """The group as if sampled by a policy that has learned a little since: some ratios are clipped, most are not.

    Ratios lean towards the advantages. Were they noise alone, the loss would be a sum that cancels, and a relative gap
    of it would tell nothing.
    """
    noise = np.random.default_rng(seed).normal(0, 0.15, logprobs.shape)
    learned = 0.05 * group.advantages[:, None] + noise
    return dataclasses.replace(group, old_logprobs=(logprobs - learned).astype(np.float32))


def write_checkpoint(policy: OurPolicy, directory: Path) -> None:
    """The decoder's weights as a plain Qwen3 checkpoint."""
    text, patch = policy.architecture.text, policy.architecture.vision.patch_shape
    ours = {name.removesuffix("/value"): np.asarray(leaf) for name, leaf in named_leaves(policy.params).items()}
    ours = {name: leaf for name, leaf in ours.items() if name.startswith("language_model/")}
    tensors: dict[str, np.ndarray] = {}
    for name, part in counterparts({name: leaf.shape for name, leaf in ours.items()}, patch).items():
        tensors |= part.to_hf(ours[name])
    plain = {n.replace("model.language_model.", "model."): np.ascontiguousarray(t) for n, t in tensors.items()}
    save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    config = dataclasses.asdict(text) | {"tie_word_embeddings": policy.architecture.tie_word_embeddings}
    del config["mrope_section"]  # with text alone the three axes count the same
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))


# ---- the sides ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One update: the seconds it took, and the loss and gradient norm before it."""

    seconds: float
    loss: float
    grad_norm: float


class OurUpdate:
    """Our update of one batch."""

    def __init__(self, policy: OurPolicy, batch: GroupBatch):
        self.policy = policy
        with jax.set_mesh(policy.mesh):
            self._batch = jax.device_put(batch, batch_shardings(policy.mesh))
        self.restart()
        loss = LossConfig(clip_low=CLIP, clip_high=CLIP, aggregation="sequence", constant_length=1)
        self._step = make_train_step(
            policy.graph,
            make_optimizer(OPTIMIZER),
            grpo_loss,
            UpdateConfig(loss, TEMPERATURE, chunk=CHUNK, freeze=FREEZE),
            policy.mesh,
            self._state,
        )

    def restart(self) -> None:
        """Back to the policy's weights and a fresh optimiser."""
        params = jax.tree.map(jnp.copy, self.policy.params)  # an update donates its state
        self._state = init_train_state(params, make_optimizer(OPTIMIZER), FREEZE, self.policy.mesh)

    @property
    def params(self) -> nnx.State:
        """The parameters as the last update left them; the next one donates them."""
        return self._state.params

    def __call__(self) -> Step:
        with jax.set_mesh(self.policy.mesh):
            seconds, (self._state, metrics) = pairs.timed(
                lambda: jax.block_until_ready(self._step(self._state, [self._batch]))
            )
        return Step(seconds, float(metrics["loss"]), float(metrics["grad_norm"]))

    @property
    def details(self) -> dict[str, Any]:
        return {}


class PeerUpdate:
    """A peer's update of the same batch, in its own process."""

    def __init__(self, worker: Worker, arguments: Mapping[str, Any]):
        self._worker = worker
        self._prepared = worker.call("prepare", **arguments)
        self._our_idle_cpu = 0.0

    def __call__(self) -> Step:
        before = time.process_time()
        step = Step(**self._worker.call("step"))
        self._our_idle_cpu += time.process_time() - before
        return step

    @property
    def details(self) -> dict[str, Any]:
        """What the peer says of itself; processor seconds that either process used while it was the other's turn."""
        return {"peer": self._prepared, "idle_cpu_seconds": [self._our_idle_cpu, self._worker.idle_cpu]}


@dataclasses.dataclass(frozen=True)
class Peer:
    """Where a peer comes from, how its update is made, and what its seconds hold."""

    name: str
    settings: Mapping[str, Any]
    what: str

    @contextlib.contextmanager
    def start(self, arguments: Mapping[str, Any], progress: Progress) -> Iterator[PeerUpdate]:
        """Its update, in a process that ends with the block."""
        requirements = Path(environment.__file__).with_name(f"{self.name}.txt")
        python = environment.python(requirements, Path(environment.PEERS.value), progress)
        with Worker(python, f"benchmarks.peers.{self.name}_worker") as worker:
            yield PeerUpdate(worker, {**arguments, **self.settings})


_TRL = "GRPOTrainer.compute_loss, backward pass, clip, AdamW (eager PyTorch, no checkpointing); the prompt in every row"
PEERS = {
    "U1": Peer("trl", {"threads": pairs.cores(), "compact": False}, f"{_TRL}; head of all tokens, as shipped"),
    "U1_compact": Peer("trl", {"threads": pairs.cores(), "compact": True}, f"{_TRL}; head of completion tokens only"),
    "U3": Peer("tunix", {}, "its trainer's jitted step: grpo_loss_fn, gradient, clip, AdamW; the prompt in every row"),
}
OURS = "one jitted group update: forward and backward pass, prompt once for all members; clip, AdamW"
APART = "the same jitted update of G groups of one member each: the prompt once for every member"


# ---- comparison --------------------------------------------------------------------------------------------


def compare(
    name: str,
    ours: OurUpdate,
    theirs: OurUpdate | PeerUpdate,
    progress: Progress,
    what: str,
    details: Mapping[str, Any],
) -> Result:
    """Compares the first updates of both sides, warms them up and times them.

    Raises:
      MismatchError: loss or gradient norm differ.
    """
    ours.restart()
    progress.phase(f"{name}: first updates", WARM_UP)
    first, other = ours(), theirs()
    gaps = check(name, first, other)
    figures = {gap: f"{value:.1e}" for gap, value in gaps.items()}
    progress.update(1, figures)
    warm_up = [[first.seconds, other.seconds]]
    for done in range(1, WARM_UP):
        warm_up.append([ours().seconds, theirs().seconds])
        progress.update(done + 1, figures)

    timed = pairs.interleave(
        lambda: {name: ours().seconds}, lambda: {name: theirs().seconds}, pairs.PAIRS.value, name, progress
    )
    measured = {"loss": first.loss, "grad_norm": first.grad_norm, **gaps, "warm_up_seconds": warm_up}
    return Result(OURS, what, timed[name], {**details, **measured, **theirs.details})


def check(name: str, ours: Step, theirs: Step) -> dict[str, float]:
    """Relative gaps of loss and gradient norm.

    Raises:
      MismatchError: one of them is above its tolerance.
    """
    gaps = {}
    for what, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        found, wanted = getattr(ours, what), getattr(theirs, what)
        gaps[f"{what}_gap"] = gap = abs(found - wanted) / abs(wanted)
        # Written so that NaN is a mismatch, too.
        if not gap <= tolerance:
            raise MismatchError(
                f"{name}: our {what} is {found:.8g}, theirs {wanted:.8g}: apart by {gap:.1e} of it, more than "
                f"{tolerance:.0e}; nothing was timed"
            )
    return gaps


# ---- floating-point operations -----------------------------------------------------------------------------


def flops_ratios(shape: Shape) -> dict[str, float]:
    """How many times fewer operations sharing takes: those that are needed, and those of dense masked attention."""
    return {
        "flops_ratio": forward_flops(shape, False, True) / forward_flops(shape, True, True),
        "flops_ratio_dense": forward_flops(shape, False, False) / forward_flops(shape, True, False),
    }


def forward_flops(shape: Shape, shared: bool, causal: bool) -> int:
    """Operations of all matmuls of a forward pass, a multiplication and an addition each.

    The backward pass takes twice as many, so ratios are those of the update. Projections and MLP: 2 a weight and token.
    Attention: 4 N H a layer and pair of query and key, of the pairs that a causal mask leaves or, not causal, of all
    that lie in the masked rectangles. Head: 2 D V a member token.
    """
    text, p, r, g = shape.text, shape.prefix, shape.member, shape.members
    d, n, k, h = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    weights = d * h * (2 * n + 2 * k) + 3 * d * text.intermediate_size
    prefixes = 1 if shared else g

    def own(length: int) -> int:
        return length * (length + 1) // 2 if causal else length**2

    tokens = prefixes * p + g * r
    pair_count = prefixes * own(p) + g * (r * p + own(r))
    if not (shared or causal):
        pair_count = g * own(p + r)  # one rectangle a row
    layers = text.num_hidden_layers * (2 * weights * tokens + 4 * n * h * pair_count)
    return layers + 2 * d * text.vocab_size * g * r


if __name__ == "__main__":
    command.run(main, required=())
