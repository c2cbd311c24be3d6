"""The train step on meshes of eight devices against one device, its donation and its shards."""

import dataclasses
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.errors import ConfigError
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.losses import LossConfig, LossCount, count_loss, loss_denominator
from maestro_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from maestro_jax.grpo.update import (
    NOTHING,
    GroupBatch,
    TrainState,
    TrainStep,
    UpdateConfig,
    batch_shardings,
    check_host_memory,
    grpo_loss,
    init_train_state,
    make_reference,
    make_train_step,
    member_logprobs,
    nll_loss,
)
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.model import Policy
from maestro_jax.policy.prompts import take_prompts
from tests.policy import reference
from tests.policy.reference import ROOT

B, G, R = 8, 2, 4
MESHES = [(2, 2, 2), *(pytest.param(axes, marks=pytest.mark.slow) for axes in ((1, 4, 2), (1, 8, 1)))]
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


# Groups of each part, and how many of its prefix and member tokens it keeps.
Cut = tuple[list[int], int, int]
HALVES: list[Cut] = [(list(range(4)), 8, R), (list(range(4, B)), 8, R)]
UNEVEN: list[Cut] = [([3, 2], 6, 2), ([0], 8, R), ([5, 7, 1, 6], 8, R), ([4], 8, R)]


def take(batch: GroupBatch, cut: Cut) -> GroupBatch:
    """Some groups of a batch, the padding of its prefixes and members cut off."""
    groups, prefix, room = np.array(cut[0]), cut[1], cut[2]
    prompts = take_prompts(jax.tree.map(np.asarray, batch.prompts), groups, prefix)
    assert prompts.mask.sum() == np.asarray(batch.prompts.mask)[groups].sum()
    assert batch.length[groups].max() <= room

    def rows(leaf: np.ndarray) -> np.ndarray:
        return leaf[groups][..., :room] if leaf.ndim == 3 else leaf[groups]

    taken = jax.tree.map(rows, dataclasses.replace(batch, prompts=None))
    return dataclasses.replace(taken, prompts=prompts, loss_rows=loss_rows(taken.mask))


@dataclasses.dataclass(frozen=True)
class Run:
    """One update: what was there before, what came out."""

    before: dict[str, np.ndarray]
    donated: TrainState
    after: TrainState
    metrics: dict[str, float]

    def update(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(leaf) - self.before[name] for name, leaf in named_leaves(self.after.params).items()}


@dataclasses.dataclass(frozen=True)
class Job:
    """A toy policy and the programs of its update."""

    mesh: Mesh
    state: TrainState
    step: TrainStep

    def run(self, parts: list[GroupBatch], left_out: LossCount = NOTHING) -> Run:
        before = {name: np.array(leaf) for name, leaf in named_leaves(self.state.params).items()}
        placed = [jax.device_put(part, batch_shardings(self.mesh)) for part in parts]
        with jax.set_mesh(self.mesh):
            after, metrics = self.step(self.state, placed, left_out)
        return Run(before, self.state, after, {name: float(value) for name, value in metrics.items()})


def make_job(
    axes: tuple[int, int, int],
    freeze: tuple[str, ...] = (),
    aggregation: str = "sequence",
    optimizer: OptimizerConfig = OPTIMIZER,
) -> Job:
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    graph, params = init_params(lambda: Policy(architecture(), nnx.Rngs(0)), mesh, ShardingRules())
    transform = make_optimizer(optimizer)
    state = init_train_state(params, transform, freeze, mesh, optimizer.offload)
    config = UpdateConfig(dataclasses.replace(LOSS, aggregation=aggregation), temperature=0.9, chunk=1, freeze=freeze)
    return Job(mesh, state, make_train_step(graph, transform, grpo_loss, config, mesh, state))


def run(axes: tuple[int, int, int], cuts: list[Cut] | None = None, **options: Any) -> Run:
    batch = host_batch()
    return make_job(axes, **options).run([take(batch, cut) for cut in cuts] if cuts else [batch])


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What was warned of in the update on one device."""
    return []


@pytest.fixture(scope="module")
def alone(told: list[str]) -> Run:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run((1, 1, 1))
    told += [str(each.message) for each in caught]
    return found


@pytest.fixture(scope="module", params=MESHES, ids=str)
def sharded(request: pytest.FixtureRequest) -> Run:
    return run(request.param)


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


def gradients(found: Run) -> dict[str, np.ndarray]:
    """Adam's first moments after one update: the clipped gradient, by a factor."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(found.after.opt_state).items() if "/mu/" in name}


def assert_same_update(found: Run, wanted: Run) -> None:
    """As one vector, the gradient may differ by rounding in fp32: a whole batch on two devices is 1.0e-6 off one."""
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-5, err_msg=name)
    ours, theirs = gradients(found), gradients(wanted)
    gap = np.sqrt(sum(np.square(ours[name] - theirs[name]).sum() for name in theirs))
    assert gap <= 2e-6 * np.sqrt(sum(np.square(leaf).sum() for leaf in theirs.values()))


@pytest.mark.parametrize(
    "cuts", [UNEVEN, pytest.param(UNEVEN[::-1], marks=pytest.mark.slow)], ids=["in order", "reversed"]
)
def test_parts_make_the_update_of_the_whole_batch(cuts: list[Cut], alone: Run) -> None:
    """Members are ragged and one is out of the loss, so a mean of the parts' means would be another update."""
    assert_same_update(run((1, 1, 1), cuts), alone)


def test_parts_on_eight_devices_make_the_update_of_the_whole_batch() -> None:
    parts = run((2, 2, 2), HALVES, aggregation="token")
    assert_same_update(parts, run((1, 1, 1), aggregation="token"))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(parts.donated))
    kept = jax.tree.map(lambda a, b: a.sharding == b.sharding, parts.donated, parts.after)
    assert all(jax.tree.leaves(kept))


@pytest.mark.parametrize("kept", [[0, 1, 4], pytest.param([0], marks=pytest.mark.slow)], ids=["parts", "one part"])
def test_groups_without_contrast_may_be_left_out_and_still_count(kept: list[int]) -> None:
    batch = host_batch()
    without = [group for group in range(B) if group not in kept]
    batch.advantages[without] = 0.0
    job, left_out = make_job((1, 1, 1), aggregation="constant"), count_loss(batch.mask[without])
    found = job.run([take(batch, ([group], 8, R)) for group in kept], left_out)
    wanted = make_job((1, 1, 1), aggregation="constant").run([batch])
    same = {"loss", "grad_norm", "update_norm"}  # the others are over the tokens that a policy was run on
    assert_same_update(*(dataclasses.replace(x, metrics={n: x.metrics[n] for n in same}) for x in (found, wanted)))


@pytest.mark.usefixtures("alone")
def test_nothing_deprecated_is_called_of_optax(told: list[str]) -> None:
    assert not [message for message in told if "optax" in message]


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


def test_devices_that_cannot_address_the_host_are_refused() -> None:
    device = types.SimpleNamespace(addressable_memories=lambda: [types.SimpleNamespace(kind="device")])
    with pytest.raises(ConfigError, match="config.optimizer.offload needs pinned_host memory, .* has device; set it"):
        check_host_memory([device])  # type: ignore[list-item]
    check_host_memory(jax.devices())


@pytest.mark.parametrize(
    "freeze",
    [
        ("vision", "embeddings"),
        pytest.param(("vision",), marks=pytest.mark.slow),
        pytest.param(("embeddings",), marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_what_is_frozen_stays_and_has_no_optimiser_state(freeze: tuple[str, ...]) -> None:
    result = run((1, 2, 1), freeze=freeze)
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


def test_nll_is_the_mean_over_tokens_in_the_loss() -> None:
    batch = host_batch()
    logprobs = np.random.default_rng(1).uniform(-5, 0, (B, G, R)).astype(np.float32)
    config = dataclasses.replace(LOSS, aggregation="token")
    denominator = loss_denominator(count_loss(batch.mask), config)
    found, _ = nll_loss(jnp.asarray(logprobs), jnp.zeros((B, G, R)), batch, config)
    np.testing.assert_allclose(found / denominator, -logprobs[batch.mask].mean(), rtol=1e-6)
