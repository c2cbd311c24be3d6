"""Every gradient of a small policy in bf16 against the same policy's in fp32, on a batch of repeated tokens.

bf16 keeps 8 bits. A rounding is off by 0.2 %, and roundings of many terms cancel; a *sum* in bf16 does not: it stops
growing once its terms are smaller than its last bit. So a gradient that is far off was summed in bf16. The worst:

    python -m pytest -n0 -rP tests/grpo/test_bfloat16_gradients.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.update import GroupBatch, UpdateConfig, member_logprobs, nll_loss
from maestro_jax.policy.model import Policy
from tests.policy import reference
from tests.policy.reference import ROOT

B, G, R = 4, 4, 128
OFTEN = 7  # seven tokens in ten
TOLERANCE = 0.02  # norm of the difference over norm


def batch() -> GroupBatch:
    rng = np.random.default_rng(0)

    def text(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < 0.7, OFTEN, rng.integers(0, reference.TEXT_IDS, shape)).astype(np.int32)

    rows = [reference.row(*text(30).tolist(), reference.noise_image(96, 128, i), *text(30).tolist()) for i in range(B)]
    prompts = reference.collate(ROOT, rows, width=80, per_group=1, patches=48)
    mask, zeros = rng.random((B, G, R)) < 0.9, np.zeros((B, G, R), np.float32)
    length, advantages = np.full((B, G), R, np.int32), np.zeros((B, G), np.float32)
    return GroupBatch(prompts, text(B, G, R), length, mask, zeros, zeros, advantages, loss_rows(mask))


def gradients(given: GroupBatch, compute_dtype: jnp.dtype) -> dict[str, np.ndarray]:
    toy = reference.architecture()
    toy = dataclasses.replace(
        toy,
        text=dataclasses.replace(toy.text, num_hidden_layers=2),
        vision=dataclasses.replace(toy.vision, depth=2, deepstack_visual_indexes=(0,)),
    )
    graph, params = nnx.split(Policy(toy, nnx.Rngs(0), jnp.float32, compute_dtype), nnx.Param)
    config = UpdateConfig(LossConfig(0.2, 0.2, "token", R), temperature=1.0, chunk=128)

    def loss(params: nnx.State, given: GroupBatch) -> jax.Array:
        found = member_logprobs(nnx.merge(graph, params), given, config.temperature, config.chunk)
        return nll_loss(*found, given, config.loss)[0] / given.mask.size

    found = named_leaves(jax.jit(jax.grad(loss))(params, given))
    return {name.removesuffix("/value"): np.asarray(leaf, np.float64) for name, leaf in found.items()}


def test_no_gradient_is_summed_in_bfloat16() -> None:
    given = batch()
    assert (given.tokens == OFTEN).sum() > 1400
    exact, rough = gradients(given, jnp.float32), gradients(given, jnp.bfloat16)
    norms = {name: np.linalg.norm(gradient) for name, gradient in exact.items()}
    assert min(norms.values()) > 1e-3, "a parameter that takes no part"
    errors = {name: np.linalg.norm(rough[name] - exact[name]) / norms[name] for name in exact}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)
    for name in worst[:5]:
        print(f"{errors[name]:.2%}  {name}")
    assert errors[worst[0]] < TOLERANCE
