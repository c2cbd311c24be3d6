"""The head of the update against one log-softmax over the whole vocabulary: time and memory.

    python -m benchmarks.head [--json FILE] [--pairs 7] [--smoke]

Both sides take the same hidden states, table and targets in fp32, and give log-probabilities, entropies, and the
gradients of a weighted sum of the log-probabilities with respect to hidden states and table (entropies are reported,
as an update does without an entropy bonus). What they compute is compared first; where it differs nothing is timed.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pairs
from benchmarks.pairs import MismatchError, Result
from configs import qwen3_vl_4b
from maestro_jax import command
from maestro_jax.grpo.logprobs import token_logprobs
from maestro_jax.observe.progress import Progress

SEED = 0
# fp32, sums are taken in another order; as fractions of the largest value of each array.
TOLERANCES = {"logprobs": 1e-6, "entropies": 1e-6, "hidden gradient": 1e-5, "table gradient": 1e-5}

OURS = "token_logprobs: the logits of a piece of the vocabulary at a time, computed again in the backward pass"
THEIRS = "einsum, jax.nn.log_softmax, take_along_axis and entropy on [rows, vocabulary] fp32 logits; jax.grad"

Array = jax.Array
Head = Callable[[Array, Array, Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is computed."""

    rows: int
    width: int
    vocabulary: int
    chunk: int  # entries of the vocabulary whose logits exist at a time on our side


FULL = Shape(512, 2560, 151_936, qwen3_vl_4b.get_config().grpo.logprob_chunk)
TOY = Shape(64, 32, 3000, 512)


def main(argv: Sequence[str]) -> None:
    del argv
    with Progress(sys.stderr) as progress:
        results = {"H1": measure(TOY if pairs.SMOKE.value else FULL, progress)}
    pairs.report(results)


def measure(shape: Shape, progress: Progress) -> Result:
    """H1: both heads on random inputs, forward and gradient.

    Raises:
      MismatchError: the two sides differ.
    """
    inputs = random_inputs(shape)
    progress.phase("compile, first runs", 2)
    ours = Side(lambda h, t, y: token_logprobs(h, t, y, 1.0, shape.chunk), inputs)
    progress.update(1, {})
    theirs = Side(naive_head, inputs)
    progress.update(2, {})
    gaps = compare(ours.first(), theirs.first())

    def seconds(side: Side) -> dict[str, float]:
        return {"H1": pairs.timed(side)[0]}

    timed = pairs.interleave(lambda: seconds(ours), lambda: seconds(theirs), pairs.PAIRS.value, "head", progress)
    details = dataclasses.asdict(shape) | {
        "compile_seconds": [ours.compile_seconds, theirs.compile_seconds],
        "largest_gap": gaps,
        "arguments_and_outputs_mib": ours.common_mib,
        "temporaries_mib": _with_ratio(ours.temporaries_mib, theirs.temporaries_mib),
        "resident_peak_mib": _with_ratio(ours.resident_peak_mib(), theirs.resident_peak_mib()),
    }
    return Result(OURS, THEIRS, timed["H1"], details)


def random_inputs(shape: Shape) -> tuple[Array, Array, Array, Array]:
    """Hidden states `[1, rows, width]`, a table with logits of variance 1, targets, and the log-probabilities' slopes
    `[1, rows]`."""
    keys = jax.random.split(jax.random.key(SEED), 4)
    hidden = jax.random.normal(keys[0], (1, shape.rows, shape.width))
    table = jax.random.normal(keys[1], (shape.vocabulary, shape.width)) * shape.width**-0.5
    targets = jax.random.randint(keys[2], (1, shape.rows), 0, shape.vocabulary)
    return hidden, table, targets, jax.random.normal(keys[3], (1, shape.rows))


def naive_head(hidden: Array, table: Array, targets: Array) -> tuple[Array, Array]:
    """Log-probabilities and entropies `[1, rows]` from logits `[1, rows, vocabulary]`."""
    logprobs = jax.nn.log_softmax(jnp.einsum("bmd,vd->bmv", hidden, table), axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    # Not `jnp.sum`: XLA's plain sum over the vocabulary is 1.5e-6 off the fp64 value on some CPUs, ours 1.2e-7.
    return chosen, -jnp.einsum("bmv,bmv->bm", jnp.exp(logprobs), logprobs)


class Side:
    """One head with its gradients, compiled."""

    def __init__(self, head: Head, inputs: tuple[Array, Array, Array, Array]):
        def objective(hidden: Array, table: Array, targets: Array, slopes: Array) -> tuple[Array, tuple[Array, Array]]:
            logprobs, entropies = head(hidden, table, targets)
            return jnp.sum(slopes * logprobs), (logprobs, entropies)

        self._inputs = inputs
        program = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
        self.compile_seconds, self._program = pairs.timed(lambda: program.lower(*inputs).compile())
        memory = self._program.memory_analysis()
        self.temporaries_mib = memory.temp_size_in_bytes / 2**20
        self.common_mib = [memory.argument_size_in_bytes / 2**20, memory.output_size_in_bytes / 2**20]

    def __call__(self) -> None:
        """One run; what it gives is freed."""
        jax.block_until_ready(self._program(*self._inputs))

    def first(self) -> dict[str, np.ndarray]:
        """What one run gives, by the names of `TOLERANCES`."""
        gradients, values = self._program(*self._inputs)
        return dict(zip(TOLERANCES, map(np.asarray, (*values, *gradients)), strict=True))

    def resident_peak_mib(self) -> float:
        """Resident memory at its highest in one run, less what was resident before and what the run returns."""
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        before = _resident_mib("VmRSS")
        self()
        return _resident_mib("VmHWM") - before - self.common_mib[1]


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest gap of each array, as a fraction of its largest value.

    Raises:
      MismatchError: one is above its tolerance.
    """
    gaps = {name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in TOLERANCES}
    for name, gap in gaps.items():
        # Written so that NaN is a mismatch, too.
        if not gap <= TOLERANCES[name]:
            raise MismatchError(f"{name} differ by {gap:.1e}, more than {TOLERANCES[name]:.0e}; nothing was timed")
    return gaps


def _resident_mib(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {key}"
    return int(found[1]) / 2**10


def _with_ratio(ours: float, theirs: float) -> dict[str, Any]:
    return {"ours": ours, "theirs": theirs, "ratio": theirs / ours}


if __name__ == "__main__":
    command.run(main, required=())
