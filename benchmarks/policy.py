"""Forward and greedy decoding of a 0.6B-shaped random Qwen3-VL against transformers on the same CPU and threads.

    python -m benchmarks.policy [--json FILE] [--pairs 7] [--smoke]

Both sides hold the same fp32 weights and read the same ids and patches. What they compute is compared first; where
it differs nothing is timed. Compilation and the first run of every program stand apart from the timed pairs.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import models, pairs
from benchmarks.models import Generated, OurForward, OurGeneration, OurPolicy, TheirForward, TheirGeneration
from benchmarks.pairs import MismatchError, Result
from maestro_jax import command
from maestro_jax.observe.progress import Progress
from maestro_jax.policy.config import PolicyArchitecture, TextConfig, VisionConfig

SEED = 0
TOLERANCE = 2e-5  # of logits and log-probabilities: fp32, sums are taken in another order


# What the seconds of each part of a generation hold: ours, theirs.
SPANS = {
    "prefill": (
        "inputs made on the host; root, then the rest of the prompt and its images, once for everybody; empty caches",
        "generate up to its first token: every member's row holds the whole prompt, images included",
    ),
    "decode": (
        "one step of all members (head, choice, decoder): the program for all tokens / tokens",
        "one step of all members (decoder, head, choice): generate after its first token / (tokens - 1)",
    ),
    "generate": ("prefill and all tokens", "generate up to its last token"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is computed; lengths in tokens."""

    architecture: PolicyArchitecture
    prompt: int  # image included
    root: int  # of the prompt: what all tasks share
    image: tuple[int, int]  # height, width in pixels; not square
    new_tokens: int
    members: int


# Qwen3-0.6B's decoder under the vision tower of the small Qwen3-VL models, and their token ids.
FULL = Shape(
    PolicyArchitecture(
        TextConfig(151_936, 1024, 3072, 28, 16, 8, 128, 1e-6, 5e6, (24, 20, 20)),
        VisionConfig(24, 1024, 4096, 16, 3, 16, 2, 2, 1024, 2304, (5, 11, 17)),
        *(151_655, 151_652, 151_653, True),
    ),
    prompt=256,
    root=64,
    image=(320, 480),
    new_tokens=16,
    members=8,
)
TOY = Shape(
    PolicyArchitecture(
        TextConfig(304, 48, 96, 2, 4, 2, 16, 1e-6, 5e6, (4, 2, 2)),
        VisionConfig(2, 32, 48, 2, 3, 16, 2, 2, 48, 64, (1,)),
        *(290, 292, 293, True),
    ),
    prompt=24,
    root=4,
    image=(64, 96),
    new_tokens=4,
    members=2,
)


def main(argv: Sequence[str]) -> None:
    del argv
    shape = TOY if pairs.SMOKE.value else FULL
    pairs.use_all_cores()

    with Progress(sys.stderr) as progress:
        # ---- One policy, twice -----------------------------------------------------------------
        progress.note("weights, on both sides")
        policy = OurPolicy(shape.architecture, SEED)
        model = models.transformers_model(policy)
        prompt = models.random_prompt(shape.architecture, shape.prompt, shape.root, shape.image, SEED)

        # ---- Everything is compared before anything is timed -----------------------------------
        progress.phase("compile, first runs", 3)
        forward = compare_forward(OurForward(policy, prompt), TheirForward(model, prompt))
        progress.update(1, forward.figures)
        generations: dict[str, Compared] = {}
        for done, (suffix, members) in enumerate((("", 1), ("_group", shape.members)), start=2):
            ours = OurGeneration(policy, prompt, members, shape.new_tokens, shape.new_tokens)
            generations[suffix] = compare_generation(ours, TheirGeneration(model, prompt, members, shape.new_tokens))
            progress.update(done, generations[suffix].figures)

        # ---- Pairs -----------------------------------------------------------------------------
        results = {"forward": time_forward(forward, progress)}
        for suffix, generation in generations.items():
            results |= time_generation(generation, suffix, shape.new_tokens, progress)
    pairs.report(results)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Two sides that compute the same."""

    ours: Any
    theirs: Any
    details: dict[str, Any]  # what was computed, how near it is, and the seconds before the timed runs

    @property
    def figures(self) -> dict[str, Any]:
        """Details for the progress line."""
        return {"compiled in": self.details["compile_seconds"], "largest gap": f"{self.details['largest_gap']:.1e}"}


# ---- comparison --------------------------------------------------------------------------------------------


def compare_forward(ours: OurForward, theirs: TheirForward) -> Compared:
    """First runs of both.

    Raises:
      MismatchError: logits differ.
    """
    (our_seconds, found), (their_seconds, wanted) = pairs.timed(ours), pairs.timed(theirs)
    gap = _gap(found, wanted, "logits")
    best, second = np.sort(wanted)[[-1, -2]]
    details = {"largest_gap": gap, "largest_logit": float(best), "margin": float(best - second)}
    return Compared(ours, theirs, ours.shape | details | _apart(ours, our_seconds, their_seconds))


def compare_generation(ours: OurGeneration, theirs: TheirGeneration) -> Compared:
    """First runs of both.

    Raises:
      MismatchError: tokens or their log-probabilities differ.
    """
    (our_seconds, found), (their_seconds, wanted) = pairs.timed(ours), pairs.timed(lambda: theirs(keep_logits=True))
    _same_tokens(found, wanted)
    details = {"largest_gap": _gap(found.logprobs, wanted.logprobs, "log-probabilities"), "margin": wanted.margin}
    return Compared(ours, theirs, ours.shape | details | _apart(ours, our_seconds, their_seconds))


def _apart(ours: OurForward | OurGeneration, our_seconds: float, their_seconds: float) -> dict[str, Any]:
    return {"compile_seconds": ours.compile_seconds, "warm_up_seconds": [our_seconds, their_seconds]}


def _gap(found: np.ndarray | None, wanted: np.ndarray | None, what: str) -> float:
    if found is None or wanted is None or found.shape != wanted.shape:
        raise ValueError(f"{what} of both sides are needed, in one shape")
    gap = float(np.abs(found - wanted).max())
    # Written so that NaN is a mismatch, too.
    if not gap <= TOLERANCE:
        raise MismatchError(
            f"{what} differ from transformers' by {gap:.1e}, more than {TOLERANCE:.0e}; nothing was timed"
        )
    return gap


def _same_tokens(found: Generated, wanted: Generated) -> None:
    if not np.array_equal(found.tokens, wanted.tokens):
        member, at = np.argwhere(found.tokens != wanted.tokens)[0]
        raise MismatchError(f"member {member} differs from transformers' at token {at}; nothing was timed")


# ---- times -------------------------------------------------------------------------------------------------


def time_forward(forward: Compared, progress: Progress) -> Result:
    def seconds(side: OurForward | TheirForward) -> dict[str, float]:
        return {"forward": pairs.timed(side)[0]}

    timed = pairs.interleave(
        lambda: seconds(forward.ours), lambda: seconds(forward.theirs), pairs.PAIRS.value, "forward", progress
    )
    ours = "inputs made on the host; root, then image and the rest of the prompt; head of the last token"
    theirs = "one forward over the whole prompt, use_cache=False, logits_to_keep=1"
    return Result(ours, theirs, timed["forward"], forward.details)


def time_generation(generation: Compared, suffix: str, new_tokens: int, progress: Progress) -> dict[str, Result]:
    """Results of prefill, of decoding (seconds a step) and of both together."""

    def seconds(side: OurGeneration | TheirGeneration, steps: int) -> dict[str, float]:
        run = side()
        whole = run.prefill_seconds + run.decode_seconds
        values = (run.prefill_seconds, run.decode_seconds / steps, whole)
        return {f"{part}{suffix}": value for part, value in zip(SPANS, values, strict=True)}

    # Their first token belongs to their prefill; all of ours are chosen by the decode program.
    timed = pairs.interleave(
        lambda: seconds(generation.ours, new_tokens),
        lambda: seconds(generation.theirs, new_tokens - 1),
        pairs.PAIRS.value,
        f"generate{suffix}",
        progress,
    )
    return {
        f"{part}{suffix}": Result(*text, timed[f"{part}{suffix}"], generation.details) for part, text in SPANS.items()
    }


if __name__ == "__main__":
    command.run(main, required=())
