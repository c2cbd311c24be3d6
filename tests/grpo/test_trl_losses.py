"""Our losses against those of TRL 1.16, computed by TRL's own code on the same random log-probabilities.

Every run compares with what TRL gave once, recorded in `trl_losses.json`; with `-m slow` TRL computes anew, in the
environment of its benchmark. The record is written, inputs included, by

    python -m tests.grpo.test_trl_losses

Where TRL defines a loss otherwise than we do, the case says by which settings or factor the two agree. TRL's "luspo",
"sapo" and "vespo", its `delta` and its bias-corrected divergence have no counterpart here.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peers import environment
from benchmarks.peers.worker import Worker
from maestro_jax.grpo.losses import LossConfig, LossInputs, policy_loss
from maestro_jax.observe.progress import Progress

RECORD = Path(__file__).with_name("trl_losses.json")
B, G, R = 2, 3, 5
CAP = 1.5

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss: TRL's settings, and ours that mean the same."""

    trl: Mapping[str, Any]
    ours: LossConfig


def ours(clip_low: float, clip_high: float, aggregation: str, **other: Any) -> LossConfig:
    return LossConfig(clip_low, clip_high, aggregation, constant_length=R, **other)


CASES = {
    "grpo": Case({"loss_type": "grpo", "epsilon": 0.2}, ours(0.2, 0.2, "sequence")),
    # bnpo: mean over the tokens of a device's batch; dapo: over those of the whole batch, which here is the same.
    "bnpo": Case({"loss_type": "bnpo", "epsilon": 0.2}, ours(0.2, 0.2, "token")),
    "dapo": Case({"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}, ours(0.2, 0.28, "token")),
    # The constant is max_completion_length, here R.
    "dr_grpo": Case({"loss_type": "dr_grpo", "epsilon": 0.2}, ours(0.2, 0.2, "constant")),
    # Its epsilon_high is the bound itself, ours the distance from 1; it has no lower bound.
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.28}, ours(10.0, 0.28, "token", surrogate="cispo")),
    "gspo": Case(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
        ours(0.03, 0.04, "sequence", surrogate="gspo"),
    ),
    # By default it also multiplies the divergence by the ratio (DeepSeek-V3.2), which Shao et al. 2024 do not.
    "divergence k3": Case(
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.3, "use_bias_correction_kl": False},
        ours(0.2, 0.2, "sequence", kl_weight=0.3, kl_estimator="k3"),
    ),
    # Its entropy bonus is a mean over tokens whatever the loss; ours is reduced like the loss, so only "token" agrees.
    "entropy": Case(
        {"loss_type": "dapo", "epsilon": 0.2, "entropy_coef": 0.2}, ours(0.2, 0.2, "token", entropy_weight=0.2)
    ),
    # Its old log-probabilities are our proximal ones, those of vLLM our old ones.
    "truncated importance": Case(
        {"loss_type": "dapo", "epsilon": 0.2, "importance": True}, ours(0.2, 0.2, "token", importance_cap=CAP)
    ),
}


def draw(seed: int) -> dict[str, np.ndarray]:
    """Random inputs `[B * G, R]`: ratios on both sides of every clip, ragged masks, one member out of the loss."""
    rng = np.random.default_rng(seed)
    shape = (B * G, R)
    old = rng.uniform(-3, -0.1, shape)
    logprobs, sampled = (old + rng.normal(0, 0.3, shape) for _ in range(2))
    mask = rng.random(shape) < 0.7
    mask[:, 0], mask[-1] = True, False
    arrays = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "sampled_logprobs": sampled,
        "reference_logprobs": logprobs + rng.normal(0, 0.5, shape),
        "entropy": rng.uniform(0, 3, shape),
        # What TRL makes of its and vLLM's log-probabilities with "token_truncate".
        "importance": np.minimum(np.exp(old - sampled), CAP),
        "mask": mask,
        "advantages": rng.standard_normal(B * G),
    }
    return {name: np.float32(array) for name, array in arrays.items()}


def our_loss(arrays: Arrays, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Our loss and its gradient by log-probabilities `[B * G, R]`, by TRL's count of members.

    TRL's means over members ("grpo", "dr_grpo") count those without a token in the loss, ours do not.
    """
    grouped = {name: jnp.asarray(a.reshape(B, G, *a.shape[1:])) for name, a in arrays.items()}
    mask = grouped["mask"] > 0
    truncated = case.ours.importance_cap > 0
    inputs = LossInputs(
        grouped["logprobs"],
        grouped["entropy"],
        grouped["sampled_logprobs" if truncated else "old_logprobs"],
        grouped["reference_logprobs"],
        grouped["advantages"],
        mask,
        grouped["old_logprobs"] if truncated else None,
    )
    counted = float(mask.any(axis=-1).mean()) if case.ours.aggregation != "token" else 1.0

    def loss(logprobs: jax.Array) -> jax.Array:
        return policy_loss(dataclasses.replace(inputs, logprobs=logprobs), case.ours)[0] * counted

    value, gradient = jax.value_and_grad(loss)(inputs.logprobs)
    return np.asarray(value), np.asarray(gradient).reshape(B * G, R)


def trl_losses(arrays: Arrays) -> dict[str, np.ndarray]:
    """TRL's "CASE/loss" and "CASE/gradient" `[B * G, R]` on these inputs."""
    requirements = Path(environment.__file__).with_name("trl.txt")
    python = environment.python(requirements, environment.CACHE, Progress(sys.stderr))
    with tempfile.TemporaryDirectory() as directory, Worker(python, "benchmarks.peers.trl_worker") as worker:
        given, into = Path(directory) / "given.npz", Path(directory) / "losses.npz"
        np.savez(given, **arrays)
        worker.call("losses", arrays=str(given), cases={n: dict(c.trl) for n, c in CASES.items()}, into=str(into))
        return dict(np.load(into))


def compare(name: str, arrays: Arrays, wanted: Arrays) -> None:
    loss, gradient = our_loss(arrays, CASES[name])
    np.testing.assert_allclose(loss, wanted[f"{name}/loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted[f"{name}/gradient"], rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 1e-2


# ---- tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, np.ndarray]]:
    record = json.loads(RECORD.read_text())
    return {part: {n: np.asarray(v, np.float32) for n, v in record[part].items()} for part in ("given", "trl")}


@pytest.fixture(scope="module", params=range(3))
def computed(request: pytest.FixtureRequest) -> tuple[Arrays, Arrays]:
    arrays = draw(request.param + 1)
    return arrays, trl_losses(arrays)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_those_recorded_of_trl(
    name: str, recorded: dict[str, dict[str, np.ndarray]]
) -> None:
    compare(name, recorded["given"], recorded["trl"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_trls(name: str, computed: tuple[Arrays, Arrays]) -> None:
    compare(name, *computed)


def write_record() -> None:
    given = draw(0)
    record = {
        "command": "python -m tests.grpo.test_trl_losses",
        "trl": {name: value.tolist() for name, value in trl_losses(given).items()},
        "given": {name: value.tolist() for name, value in given.items()},
    }
    RECORD.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    write_record()
