"""The train step on meshes of eight devices against one device, its donation and its shards."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.update import (
    GroupBatch,
    OptimizerConfig,
    TrainState,
    batch_shardings,
    grpo_loss,
    init_train_state,
    make_optimizer,
    make_reference,
    make_train_step,
    member_logprobs,
    nll_loss,
    split_groups,
)
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.model import Policy
from tests.policy import reference
from tests.policy.reference import ROOT

B, G, R = 8, 2, 4
MESHES = {"data 2, fsdp 2, tensor 2": (2, 2, 2), "fsdp 4, tensor 2": (1, 4, 2), "fsdp 8": (1, 8, 1)}
LOSS = LossConfig(clip_low=0.2, clip_high=0.2, aggregation="sequence", constant_length=R)
# A large epsilon keeps Adam's first update a smooth function of the gradient: with 1e-8 it is the sign, and
# the rounding of a gradient near zero would decide whether a parameter goes up or down.
OPTIMIZER = OptimizerConfig(
    learning_rate=1.0, warmup_steps=2, decay_steps=0, b1=0.9, b2=0.95, eps=0.1, weight_decay=0.01, clip_norm=1.0
)


def architecture() -> PolicyArchitecture:
    toy = reference.architecture()
    return dataclasses.replace(
        toy,
        text=dataclasses.replace(toy.text, num_hidden_layers=2),
        vision=dataclasses.replace(toy.vision, depth=1, deepstack_visual_indexes=(0,)),
    )


def host_batch() -> GroupBatch:
    """Groups with and without an image, ragged members, one member out of the loss."""
    wide, tall = reference.noise_image(32, 64, 1), reference.noise_image(64, 32, 2)
    kinds = [reference.row(5, wide, 6, 7), reference.row(8, 9), reference.row(tall, 10), reference.row(11, 12, 13)]
    prompts = reference.collate(ROOT, kinds * 2, width=8, per_group=1, patches=8)
    rng = np.random.default_rng(0)
    length = rng.integers(1, R + 1, (B, G)).astype(np.int32)
    mask = np.arange(R) < length[..., None]
    mask[3, 1] = False
    old = rng.uniform(-7, -5, (B, G, R)).astype(np.float32)
    advantages = rng.standard_normal((B, G)).astype(np.float32)
    members, rows = reference.members(B, G, R), loss_rows(mask)
    return GroupBatch(prompts, members, length, mask, old, np.zeros_like(old), advantages, rows)


@dataclasses.dataclass(frozen=True)
class Run:
    """One update: what was there before, what came out."""

    before: dict[str, np.ndarray]
    donated: TrainState
    after: TrainState
    metrics: dict[str, float]

    def update(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(leaf) - self.before[name] for name, leaf in named_leaves(self.after.params).items()}


def run(axes: tuple[int, int, int], loss: Any, freeze: tuple[str, ...] = (), microbatches: int = 1) -> Run:
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    graph, params = init_params(lambda: Policy(architecture(), nnx.Rngs(0)), mesh, ShardingRules())
    optimizer = make_optimizer(OPTIMIZER)
    state = init_train_state(params, optimizer, freeze, mesh)
    step = make_train_step(graph, optimizer, loss, LOSS, 0.9, 2, freeze, microbatches, mesh, state)
    before = {name: np.array(leaf) for name, leaf in named_leaves(state.params).items()}
    with jax.set_mesh(mesh):
        after, metrics = step(state, jax.device_put(host_batch(), batch_shardings(mesh)))
    return Run(before, state, after, {name: float(value) for name, value in metrics.items()})


@pytest.fixture(scope="module")
def alone() -> Run:
    return run((1, 1, 1), grpo_loss)


@pytest.fixture(scope="module", params=MESHES)
def sharded(request: pytest.FixtureRequest) -> Run:
    return run(MESHES[request.param], grpo_loss)


def test_a_mesh_computes_what_one_device_does(alone: Run, sharded: Run) -> None:
    for name, value in alone.before.items():
        np.testing.assert_allclose(sharded.before[name], value, rtol=1e-6, err_msg=name)
    # fp32: sums over groups and features are split over devices; a missing collective is off by parts of one.
    for name, value in alone.metrics.items():
        np.testing.assert_allclose(sharded.metrics[name], value, rtol=1e-5, err_msg=name)
    for name, update in alone.update().items():
        size = np.abs(update).max()
        assert size > 1e-4, f"{name} does not move; the comparison would be empty"
        stored = 1.2e-7 * np.abs(alone.before[name]).max()  # a parameter is kept to one part in 2**23
        assert np.abs(sharded.update()[name] - update).max() <= 1e-5 * size + stored, name


@pytest.mark.parametrize(("axes", "parts"), [((1, 1, 1), 4), ((1, 2, 1), 2), ((2, 2, 2), 2)], ids=str)
def test_microbatches_make_the_update_of_the_whole_batch(axes: tuple[int, int, int], parts: int, alone: Run) -> None:
    """Members are ragged and one is out of the loss, so a mean of the parts' means would be another update."""
    split = run(axes, grpo_loss, microbatches=parts)
    for name, value in alone.metrics.items():
        np.testing.assert_allclose(split.metrics[name], value, rtol=1e-5, err_msg=name)
    for name, update in alone.update().items():
        stored = 1.2e-7 * np.abs(alone.before[name]).max()
        assert np.abs(split.update()[name] - update).max() <= 1e-5 * np.abs(update).max() + stored, name


def test_parts_of_a_batch_are_every_nth_group_with_its_images() -> None:
    batch = host_batch()
    parts = split_groups(batch, 4)
    assert parts.prompts.root is None
    for part in range(4):
        np.testing.assert_array_equal(parts.tokens[part], batch.tokens[part::4])
        np.testing.assert_array_equal(parts.prompts.images.patches[part], batch.prompts.images.patches[part::4])


def test_state_is_donated_and_keeps_its_shards(sharded: Run) -> None:
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(sharded.donated))
    kept = jax.tree.map(lambda a, b: a.sharding == b.sharding, sharded.donated, sharded.after)
    assert all(jax.tree.leaves(kept))


def test_moments_are_sharded_like_their_parameters(sharded: Run) -> None:
    wanted = {name: leaf.sharding for name, leaf in named_leaves(sharded.after.params).items()}
    moments = {n: leaf for n, leaf in named_leaves(sharded.after.opt_state).items() if "/mu/" in n or "/nu/" in n}
    assert len(moments) == 2 * len(wanted)
    for name, leaf in moments.items():
        parameter = name.split("/mu/")[-1].split("/nu/")[-1]
        assert leaf.sharding == wanted[parameter], name
    assert any(not sharding.is_fully_replicated for sharding in wanted.values())


@pytest.mark.parametrize("freeze", [("vision",), ("embeddings",), ("vision", "embeddings")], ids="+".join)
def test_what_is_frozen_stays_and_has_no_optimiser_state(freeze: tuple[str, ...]) -> None:
    result = run((1, 2, 1), grpo_loss, freeze)
    prefixes = {"vision": "visual/", "embeddings": "language_model/embed_tokens/"}
    frozen = {name for name in result.before if name.startswith(tuple(prefixes[part] for part in freeze))}
    assert frozen and frozen < result.before.keys()
    for name, update in result.update().items():
        assert (np.abs(update).max() == 0.0) == (name in frozen), name
    moments = [name for name in named_leaves(result.after.opt_state) if "/mu/" in name or "/nu/" in name]
    assert len(moments) == 2 * (len(result.before) - len(frozen))
    assert not any(name in moment for name in frozen for moment in moments)
    assert result.after.params.keys() == result.donated.params.keys()


def test_steps_are_counted(alone: Run) -> None:
    assert int(alone.after.step) == 1


def test_the_reference_outlives_the_donation_of_what_it_was_copied_from() -> None:
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    graph, params = init_params(lambda: Policy(architecture(), nnx.Rngs(0)), mesh, ShardingRules())
    add_reference = make_reference(graph, params, 0.9, 2, mesh)
    batch = jax.device_put(host_batch(), batch_shardings(mesh))
    with jax.set_mesh(mesh):
        wanted = member_logprobs(nnx.merge(graph, params), batch, 0.9, 2)[0]
        jax.tree.map(lambda leaf: leaf.delete(), params)
        found = add_reference(batch)
    # The same program on the same numbers; only its fusions may differ.
    np.testing.assert_allclose(found.reference_logprobs, wanted, rtol=1e-5, atol=1e-6)
    assert found.old_logprobs is batch.old_logprobs and np.abs(wanted).max() > 1


@pytest.mark.parametrize(
    ("decay_steps", "rates"),
    # 4 steps of a half cosine from 1 at step 2 to 0 at step 6; without decay the rate stays
    [(0, [0.5, 0.75, 1, 1, 1, 1, 1]), (6, [0.5, 0.75, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])],
    ids=["constant", "cosine"],
)
def test_the_rate_warms_up_and_stays_or_falls(decay_steps: int, rates: list[float]) -> None:
    config = dataclasses.replace(OPTIMIZER, decay_steps=decay_steps, clip_norm=1e9, weight_decay=0.0, eps=1e-8)
    optimizer, params = make_optimizer(config), {"w": jnp.zeros(1)}
    state, found = optimizer.init(params), []
    for _ in rates:
        update, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        found.append(float(-update["w"][0]))  # of a constant gradient, Adam makes the rate itself
    np.testing.assert_allclose(found, rates, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_together_and_decay_is_decoupled() -> None:
    """A gradient (3, 4) is clipped to norm 0.5; Adam's first update is g / (|g| + eps), the decay stands beside it."""
    optimizer = make_optimizer(dataclasses.replace(OPTIMIZER, clip_norm=0.5, eps=1.0, warmup_steps=1, weight_decay=0.1))
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    update, _ = optimizer.update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(update["a"], [-(0.3 / 1.3 + 0.1)], rtol=1e-5)
    np.testing.assert_allclose(update["b"], [-(0.4 / 1.4 + 0.1)], rtol=1e-5)


def test_nll_is_the_mean_over_tokens_in_the_loss() -> None:
    batch = host_batch()
    logprobs = np.random.default_rng(1).uniform(-5, 0, (B, G, R)).astype(np.float32)
    found, _ = nll_loss(jnp.asarray(logprobs), jnp.zeros((B, G, R)), batch, LOSS, batch.mask)
    np.testing.assert_allclose(found, -logprobs[batch.mask].mean(), rtol=1e-6)
