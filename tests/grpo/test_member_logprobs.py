"""The group form against one plain row per member, in value and in gradient; the rows are transformers'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.update import GroupBatch, member_logprobs
from maestro_jax.policy.attention.interface import AttentionConfig
from tests.policy import reference
from tests.policy.reference import ROOT, assert_near

G, R = 3, 6
TEMPERATURE = 0.8
LENGTH = np.array([[6, 4, 1], [2, 6, 5], [6, 1, 3]], np.int32)
TOLERANCE = 1e-5  # fp32; copying the prefix G times or once changes the order of sums, nothing else


def in_loss() -> np.ndarray:
    """bool `[B, G, R]`: one member is out, some tokens are masked."""
    mask = (np.arange(R) < LENGTH[..., None]) & (np.random.default_rng(4).random((3, G, R)) < 0.8)
    mask[1, 2] = False
    return mask


def weights() -> np.ndarray:
    """Of the log-probabilities and of the entropies, `[2, B, G, R]`."""
    return (np.random.default_rng(5).standard_normal((2, 3, G, R)) * in_loss()).astype(np.float32)


BACKENDS = {
    "blocks": AttentionConfig("blocks", block=8),
    "splash, interpreted": AttentionConfig("splash_interpret"),
}


def group_form(model: Any, attention: AttentionConfig) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """The objective, log-probabilities `[B, G, R]`, and gradients by name."""
    params = reference.as_params(reference.weights_of(model))
    graph, state = nnx.split(reference.load(params, attention=attention), nnx.Param)
    # Splash attention takes rows of 128 tokens.
    width, patches = (128 - G * R, 128) if attention.backend == "splash_interpret" else (24, 24)
    prompts = reference.collate(ROOT, reference.three_rows(), width, per_group=2, patches=patches, filler=3)
    tokens = np.where(np.arange(R) < LENGTH[..., None], reference.members(3, G, R), 7)
    zeros = np.zeros((3, G, R), np.float32)
    arrays = (tokens, LENGTH, in_loss(), zeros, zeros, zeros[..., 0], loss_rows(in_loss()))
    batch = GroupBatch(prompts, *map(jnp.asarray, arrays))

    def objective(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        logprobs, entropy = member_logprobs(nnx.merge(graph, state), batch, TEMPERATURE, chunk=100)
        return jnp.sum(weights()[0] * logprobs) + jnp.sum(weights()[1] * entropy), logprobs

    (value, logprobs), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(state)
    named = {name.removesuffix("/value"): np.asarray(leaf) for name, leaf in named_leaves(gradients).items()}
    return float(value), np.asarray(logprobs), named


@pytest.fixture(scope="module")
def rows() -> tuple[Any, ...]:
    """The transformers model, and what plain rows give."""
    model = reference.reference_model()
    return model, *plain_rows(model)


def plain_rows(model: Any) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """The same numbers from 3 x G separate rows: root, prefix and member repeated, nothing padded."""
    import torch

    model.zero_grad()
    logprobs, total = np.zeros((3, G, R), np.float32), 0.0
    for b, row in enumerate(reference.three_rows()):
        for g in range(G):
            n = LENGTH[b, g]
            member = reference.members(3, G, R)[b, g, :n]
            logits = reference.plain_logits(model, ROOT, row, member)
            start = len(ROOT) + len(row.ids) - 1
            table = torch.log_softmax(logits[start : start + n] / TEMPERATURE, dim=-1)
            chosen = table.gather(-1, torch.tensor(member).long()[:, None])[:, 0]
            entropy = -(table.exp() * table).sum(dim=-1)
            for_logprob, for_entropy = torch.tensor(weights()[:, b, g, :n])
            value = (for_logprob * chosen + for_entropy * entropy).sum()
            value.backward()
            total += value.item()
            logprobs[b, g, :n] = chosen.detach().numpy()
    return total, logprobs, reference.as_params({name: p.grad.numpy() for name, p in model.named_parameters()})


@pytest.mark.parametrize("attention", BACKENDS.values(), ids=BACKENDS)
def test_values_and_gradients_equal_those_of_separate_rows(rows: tuple[Any, ...], attention: AttentionConfig) -> None:
    model, wanted_value, wanted_logprobs, wanted = rows
    value, logprobs, gradients = group_form(model, attention)
    assert abs(value - wanted_value) <= 1e-6 * abs(wanted_value)
    assert_near(logprobs, np.where(in_loss(), wanted_logprobs, 0), TOLERANCE, "logprobs")
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert np.abs(wanted[name]).max() > 1e-3, f"{name} takes no part; the comparison would be empty"
        assert_near(gradient, wanted[name], TOLERANCE, name)
