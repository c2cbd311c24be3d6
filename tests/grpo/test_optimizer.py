"""The optimiser: rate, clip and decay; moments in fewer bytes, and in the host's memory."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from maestro_jax.checkpoint.store import CheckpointStore, named_leaves
from maestro_jax.grpo.config import Moments
from maestro_jax.grpo.losses import LossConfig, LossCount
from maestro_jax.grpo.optimizer import (
    OptimizerConfig,
    dequantise,
    hashed,
    make_optimizer,
    quantise,
    round_to_bfloat16,
    scale_by_adam,
)
from maestro_jax.grpo.update import (
    NOTHING,
    Sums,
    Total,
    TrainState,
    UpdateConfig,
    grpo_loss,
    init_train_state,
    make_train_step,
)
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, init_params
from maestro_jax.policy.layers import Linear

OPTIMIZER = OptimizerConfig(
    learning_rate=1.0, warmup_steps=2, decay_steps=0, b1=0.9, b2=0.95, eps=0.1, weight_decay=0.01, clip_norm=1.0
)
LEVEL = 2 ** (1 / 8)  # from one level of a byte to the next


def chances(count: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda seed: hashed(seed, shape) >> 16)(jnp.arange(count, dtype=jnp.uint32))


# ---- rate, clip, decay -------------------------------------------------------------------------------------


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


# ---- moments in fewer bytes --------------------------------------------------------------------------------


def test_fp32_moments_are_those_of_optax() -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)}
    ours, theirs = scale_by_adam(0.9, 0.99, 1e-8, "float32"), optax.scale_by_adam(0.9, 0.99, 1e-8)
    mine, wanted = ours.init(params), theirs.init(params)
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)
        found, mine = ours.update(gradients, mine)
        update, wanted = theirs.update(gradients, wanted)
        jax.tree.map(np.testing.assert_array_equal, (found, mine), (update, wanted))


def test_parameters_in_bfloat16_have_fp32_moments() -> None:
    state = scale_by_adam(0.9, 0.99, 1e-8, "float32").init({"w": jnp.zeros(3, jnp.bfloat16)})
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.float32


@pytest.mark.parametrize(("moments", "bytes_"), [("float32", 8 * 640), ("bfloat16", 4 * 640), ("int8", 2 * (640 + 40))])
def test_bytes_of_the_moments(moments: str, bytes_: int) -> None:
    """10 rows of 64 elements: as bytes, each row has 4 more for its scale."""
    state = scale_by_adam(0.9, 0.99, 1e-8, moments).init({"w": jnp.zeros((2, 5, 64))})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves((state.mu, state.nu))) == bytes_


def test_what_looks_random_is_even_and_differs_between_seeds() -> None:
    drawn = np.asarray(chances(64, (64, 32)), np.float64) / 2**16
    # 131,072 numbers: the mean of even ones is 0.5 within 4 standard errors of 0.0008, of 64 within 4 of 0.036.
    assert abs(drawn.mean() - 0.5) < 4 * 0.0008
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 5 * 0.036
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(drawn[:, 0, :-1].ravel(), drawn[:, 0, 1:].ravel())[0, 1]) < 0.1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
def test_bfloat16_is_one_of_the_two_neighbours(values: list[float]) -> None:
    x = jnp.asarray(values, jnp.float32)
    low, high = (round_to_bfloat16(x, jnp.full(x.shape, c, jnp.uint32)).astype(jnp.float32) for c in (0, 2**16 - 1))
    assert (jnp.abs(low) <= jnp.abs(x)).all() and (jnp.abs(x) <= jnp.abs(high)).all()
    assert (jnp.abs(high) <= jnp.abs(low) * (1 + 2**-7) + 1e-37).all()
    exact = x.astype(jnp.bfloat16)
    assert (round_to_bfloat16(exact.astype(jnp.float32), hashed(jnp.uint32(0), x.shape) >> 16) == exact).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_bytes_are_right_in_the_mean_and_a_level_off_at_most(dtype: str) -> None:
    rng = np.random.default_rng(0)
    octaves = 15 if dtype == "int8" else 31
    x = np.exp2(-rng.uniform(0, octaves, (4, 64))).astype(np.float32) * np.float32([[1e-12], [1e-3], [1.0], [1e9]])
    x = x * rng.choice([-1, 1], x.shape).astype(np.float32) if dtype == "int8" else x
    drawn = jax.vmap(lambda chance: dequantise(quantise(jnp.asarray(x), dtype, chance)))(chances(400, x.shape))
    ratio = np.asarray(drawn) / x
    assert ratio.min() >= 1 / LEVEL - 1e-4 and ratio.max() <= LEVEL + 1e-4
    # A draw is off by at most 4.5 % (standard deviation); 5 standard errors of the mean of 400.
    assert np.abs(ratio.mean(axis=0) - 1).max() < 5 * 0.045 / 20
    peak = np.abs(x) == np.abs(x).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(drawn)[0][peak], x[peak], rtol=1e-6)


def test_bytes_at_the_bottom() -> None:
    """Far below the scale a first moment is 0 or the lowest level, a second never 0; what is 0 stays 0."""
    x = jnp.array([[1.0, 1e-30, 0.0], [0.0, 0.0, 0.0]])
    chance = jnp.full(x.shape, 2**16 - 1, jnp.uint32)  # the least likely to round up
    assert quantise(x, "uint8", chance).levels.tolist() == [[255, 1, 0], [0, 0, 0]]
    assert quantise(-x, "int8", chance).levels.tolist() == [[-127, 0, 0], [0, 0, 0]]
    assert not dequantise(quantise(x, "uint8", chance))[1].any()


@pytest.mark.parametrize("moments", get_args(Moments))
def test_a_second_moment_falls_though_a_step_is_less_than_its_last_place(moments: str) -> None:
    """Without gradients, b2 = 0.999 leaves 0.368 of it after 1,000 steps; rounded to the nearest bfloat16, all."""
    adam = scale_by_adam(0.9, 0.999, 1e-8, moments)
    params = {"w": jnp.zeros((1, 256))}
    _, state = adam.update({"w": jnp.ones((1, 256))}, adam.init(params))
    none = {"w": jnp.zeros((1, 256)).at[0, 0].set(1.0)}  # keeps the scale of the row where it is
    state = jax.lax.fori_loop(0, 1000, lambda _, state: adam.update(none, state)[1], state)
    nu = dequantise(state.nu["w"]) if moments == "int8" else state.nu["w"].astype(jnp.float32)
    left = nu[0, 1:].mean() / 1e-3
    # The walk of one element is 4.5 % x sqrt(1,000) wide at most; 255 elements in the mean.
    np.testing.assert_allclose(left, 0.999**1000, rtol=0.1)


@pytest.mark.parametrize("b2", [0.999, pytest.param(0.95, marks=pytest.mark.slow)])
def test_training_follows_fp32_moments(b2: float) -> None:
    """A small regression, features of very different sizes: over many orders of its data, the loss falls as with fp32.

    One order says little: at a thousandth of the loss it differs by 7 % (standard deviation), to either side.
    """
    orders = 32
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((512, 32)) * np.logspace(-2, 1, 32)).astype(np.float32)
    y = np.tanh(x @ rng.standard_normal((32, 8)) / 10).astype(np.float32)
    start = {"a": 0.1 * rng.standard_normal((32, 64)), "b": 0.1 * rng.standard_normal((64, 8)), "c": np.zeros(8)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    batches = jnp.asarray(rng.integers(0, 512, (orders, 500, 64)))

    def loss(params: dict, rows: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x[rows] @ params["a"]) @ params["b"] + params["c"] - y[rows]) ** 2)

    x, y = jnp.asarray(x), jnp.asarray(y)
    curves = {}
    for moments in get_args(Moments):
        config = dataclasses.replace(OPTIMIZER, learning_rate=3e-3, b2=b2, eps=1e-8, weight_decay=0.0, moments=moments)
        optimizer = make_optimizer(config)

        def step(carry: Any, rows: jax.Array, optimizer: Any = optimizer) -> Any:
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, rows)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        def train(batches: jax.Array, step: Any = step, optimizer: Any = optimizer) -> jax.Array:
            return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

        curves[moments] = np.asarray(jax.jit(jax.vmap(train))(batches)).reshape(orders, 10, 50).mean(axis=2)
    assert curves["float32"][:, -1].mean() < 0.01 * curves["float32"][:, 0].mean()
    # Measured with 64 orders, the largest of ten stretches of 50 steps, jax 0.10.2 and 0.12.0: 0.2 % (bfloat16) and
    # 1.3 % (int8). With 32, the standard error of the latter is 1.3 %.
    for moments in ("bfloat16", "int8"):
        ratio = np.exp(np.log(curves[moments] / curves["float32"]).mean(axis=0))
        np.testing.assert_allclose(ratio, 1, rtol=0.05)


# ---- in a train state --------------------------------------------------------------------------------------


class Toy(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = Linear(8, 12, ("embed", "mlp"), True, jnp.float32, rngs)
        self.second = Linear(12, 8, ("mlp", "embed"), False, jnp.float32, rngs)


def make_state(config: OptimizerConfig, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    graph, params = init_params(Toy, mesh, ShardingRules())
    return graph, init_train_state(params, make_optimizer(config), (), mesh, config.offload)


def updated(config: OptimizerConfig, axes: tuple[int, int, int], updates: int = 2) -> TrainState:
    """The state after updates with given gradients."""
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    graph, state = make_state(config, mesh)
    settings = UpdateConfig(LossConfig(0.2, 0.2, "token", 1), 1.0, 1)
    step = make_train_step(graph, make_optimizer(config), grpo_loss, settings, mesh, state)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        for _ in range(updates):
            gradients = jax.tree.map(
                lambda leaf: jax.device_put(rng.standard_normal(leaf.shape).astype(np.float32), leaf.sharding),
                step.zeros(),
            )
            total = Total(gradients, Sums(jnp.ones(()), LossCount(8, 2), {}))
            state, _ = step.finish(state, total, NOTHING)
    return state


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "in the host's memory"])
def test_moments_of_a_byte_lie_in_the_shards_of_their_parameters(offload: bool) -> None:
    state = updated(dataclasses.replace(OPTIMIZER, moments="int8", offload=offload), (2, 2, 2))
    parameters, moments = named_leaves(state.params), named_leaves(state.opt_state)
    for name, parameter in parameters.items():
        spec = parameter.sharding.spec
        for kind, wanted in (("levels", spec), ("scales", PartitionSpec(*spec[:-1]))):
            for moment in ("mu", "nu"):
                sharding = moments[f"1/{moment}/{name}/{kind}"].sharding
                assert sharding.spec == wanted, name
                assert sharding.memory_kind == ("pinned_host" if offload else "device")
        assert parameter.sharding.memory_kind == "device"


@pytest.mark.parametrize("spoiled", ["a gradient", "the loss"])
@pytest.mark.parametrize(("moments", "offload"), [("float32", False), ("bfloat16", False), ("int8", True)])
def test_an_update_that_is_not_finite_changes_nothing(moments: str, offload: bool, spoiled: str) -> None:
    """One number, on one of eight devices: the run goes on as one that never came to that update."""
    config = dataclasses.replace(OPTIMIZER, moments=moments, offload=offload)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    settings = UpdateConfig(LossConfig(0.2, 0.2, "token", 1), 1.0, 1)

    def run(spoil: bool) -> tuple[TrainState, list[dict[str, float]]]:
        graph, state = make_state(config, mesh)
        step = make_train_step(graph, make_optimizer(config), grpo_loss, settings, mesh, state)
        rng, found = np.random.default_rng(0), []
        with jax.set_mesh(mesh):
            for number in range(3):
                leaves, structure = jax.tree.flatten(step.zeros())
                given = [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
                loss = np.float32(1.0)
                if number == 1:
                    if not spoil:
                        continue
                    given[-1].flat[-1] = np.nan if spoiled == "a gradient" else 1.0
                    loss = np.float32(np.inf if spoiled == "the loss" else 1.0)
                placed = [jax.device_put(x, leaf.sharding) for x, leaf in zip(given, leaves, strict=True)]
                sums = Sums(jnp.asarray(loss), LossCount(8, 2), {})
                total = Total(jax.tree.unflatten(structure, placed), sums)
                state, metrics = step.finish(state, total, NOTHING)
                found.append({name: float(value) for name, value in metrics.items()})
        return state, found

    (state, metrics), (wanted, _) = run(spoil=True), run(spoil=False)
    assert [each["skipped"] for each in metrics] == [0.0, 1.0, 0.0]
    assert metrics[1]["update_norm"] == 0.0 and all(each["update_norm"] > 0 for each in metrics[::2])
    assert int(state.step) == 2
    for name, leaf in named_leaves(wanted).items():
        np.testing.assert_array_equal(named_leaves(state)[name], leaf, err_msg=name)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_rounding_depends_neither_on_the_mesh_nor_on_where_moments_are_kept(moments: str) -> None:
    config = dataclasses.replace(OPTIMIZER, moments=moments)
    alone = named_leaves(updated(config, (1, 1, 1)))
    away = named_leaves(updated(dataclasses.replace(config, offload=True), (2, 2, 2)))
    for name, leaf in named_leaves(updated(config, (2, 2, 2))).items():
        np.testing.assert_array_equal(away[name], leaf, err_msg=name)
        # Norms are summed over devices in another order; a level is 9 %.
        ours, theirs = np.asarray(alone[name], np.float32), np.asarray(leaf, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("moments", get_args(Moments))
@pytest.mark.parametrize("offload", [False, True])
def test_checkpoints_hold_every_bit(moments: str, offload: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(OPTIMIZER, moments=moments, offload=offload)
    saved = updated(config, (2, 2, 2))
    store = CheckpointStore(tmp_path, 1)
    store.save(2, saved, {})
    store.close()
    again = CheckpointStore(tmp_path, 1)
    _, target = make_state(config, make_mesh(MeshConfig(1, 4, 1), jax.devices()[:4]))
    places = [leaf.sharding for leaf in jax.tree.leaves(target)]
    restored = again.restore_newest(target)
    again.close()
    assert restored is not None
    for (name, leaf), wanted, place in zip(
        named_leaves(restored.state).items(), jax.tree.leaves(saved), places, strict=True
    ):
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes(), name
        assert (leaf.dtype, leaf.sharding) == (wanted.dtype, place), name
