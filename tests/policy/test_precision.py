"""Which precision the products of a run are lowered with; nothing is run. (CPUs multiply in fp32 whatever it is.)"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from maestro_jax.grpo.update import UpdateConfig, grpo_loss, init_train_state, make_train_step
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, param_shardings
from maestro_jax.policy.config import Precision
from maestro_jax.policy.model import Policy
from maestro_jax.rollout.programs import Weights, rollout_programs
from tests.grpo.test_update import architecture, host_batch
from tests.rollout import test_programs as rollout
from tests.rollout import toy

CASES = {
    "fp32": (jnp.float32, "auto", "HIGHEST"),
    "fp32, asked to be quick": (jnp.float32, "default", "DEFAULT"),
    "bf16": (jnp.bfloat16, "auto", "DEFAULT"),
}


def precisions(lowered: Any) -> set[str]:
    """Of all products in a program."""
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 10
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in products]
    return {side for match in found for side in (match.groups() if match else ("DEFAULT",))}


def of_an_update(policy: Policy) -> Iterator[Any]:
    """With its gradient, whose backward passes are partly our own."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    graph, params = nnx.split(policy, nnx.Param)
    params = jax.device_put(params, param_shardings(params, mesh, ShardingRules()))
    optimizer = make_optimizer(OptimizerConfig())
    state = init_train_state(params, optimizer, (), mesh)
    config = UpdateConfig(LossConfig(0.2, 0.2, "token", 4), temperature=1.0, chunk=64)
    step = make_train_step(graph, optimizer, grpo_loss, config, mesh, state)
    with jax.set_mesh(mesh):
        yield step.accumulate.lower(params, None, host_batch())


def of_a_rollout(policy: Policy) -> Iterator[Any]:
    graph, params = nnx.split(policy, nnx.Param)
    run, prompts, weights = rollout_programs(graph, rollout.SIZES, rollout.CONFIG), toy.prompts(), Weights.of(params)
    groups, lanes, _ = jax.eval_shape(run.open, params, prompts.root)
    at = rollout.integers(1, 3)
    yield run.open.lower(params, prompts.root)
    yield run.prefill.lower(params, groups, prompts, at)
    yield run.decode.lower(weights, groups, lanes, rollout.TABLES, jax.ShapeDtypeStruct((), jnp.float32))
    yield run.append.lower(weights, groups, lanes, at, rollout.integers(1, 3, 5), at)


@pytest.mark.parametrize(("dtype", "precision", "wanted"), CASES.values(), ids=CASES)
def test_every_product_has_the_precision_of_the_policy(dtype: Any, precision: Precision, wanted: str) -> None:
    def policy(of: Any) -> Policy:
        return Policy(of, nnx.Rngs(0), jnp.float32, dtype, precision=precision)

    for lowered in (*of_an_update(policy(architecture())), *of_a_rollout(policy(toy.architecture()))):
        assert precisions(lowered) == {wanted}
