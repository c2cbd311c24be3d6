"""Sharding rules: logical axes become mesh axes, and what cannot be split is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, over_groups, param_shardings, replicated
from maestro_jax.policy.layers import Linear, stack


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])


def linear(d_in: int, d_out: int) -> Linear:
    return Linear(d_in, d_out, ("embed", "mlp"), True, jnp.float32, nnx.Rngs(0))


def specs(module: nnx.Module, mesh: Mesh) -> list[PartitionSpec]:
    shardings = param_shardings(nnx.state(module, nnx.Param), mesh, ShardingRules())
    return [sharding.spec for sharding in jax.tree.leaves(shardings)]


def test_axes_become_mesh_axes(mesh: Mesh) -> None:
    assert specs(linear(8, 12), mesh) == [PartitionSpec("tensor"), PartitionSpec("fsdp", "tensor")]  # bias, kernel


def test_the_layer_axis_of_a_stack_is_replicated(mesh: Mesh) -> None:
    stacked = stack(lambda rngs: Linear(8, 12, ("embed", "mlp"), True, jnp.float32, rngs), 3, nnx.Rngs(0))
    assert specs(stacked, mesh) == [PartitionSpec(None, "tensor"), PartitionSpec(None, "fsdp", "tensor")]


def test_one_mesh_axis_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one mesh axis twice; change ShardingRules"):
        ShardingRules(embed="tensor").spec(("embed", "mlp"))
    assert ShardingRules().spec((None, None)) == PartitionSpec(None, None)


def test_a_size_that_does_not_divide_names_parameter_and_cure(mesh: Mesh) -> None:
    with pytest.raises(
        ConfigError,
        match=r"kernel.* \(8, 9\): 9 does not divide over mesh axis tensor=2; "
        r"choose config.mesh.tensor among the divisors of 9",
    ) as caught:
        specs(Linear(8, 9, ("embed", "mlp"), False, jnp.float32, nnx.Rngs(0)), mesh)
    assert "\n" not in str(caught.value)


def test_groups_are_spread_over_data_and_fsdp(mesh: Mesh) -> None:
    x = jax.device_put(np.arange(8.0), over_groups(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2,)}
    assert jax.device_put(np.arange(8.0), replicated(mesh)).is_fully_replicated


def test_gradients_are_summed_over_devices_in_fp32(mesh: Mesh) -> None:
    """A sum of ones over 295 rows on eight devices; bfloat16 knows 294 and 296."""
    x = jnp.ones((8, 37, 4), jnp.bfloat16).at[0, 0].set(0)
    over_x = jnp.ones((8, 37, 1)).at[0, 0].set(2)  # the gradient of what the layer gives
    layer = Linear(4, 12, ("embed", "mlp"), True, jnp.float32, nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def value(params: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(over_x * nnx.merge(graph, params)(x).astype(jnp.float32))

    for axes in ((2, 2, 2), (1, 4, 2), (4, 2, 1), (8, 1, 1)):
        over = make_mesh(MeshConfig(*axes), jax.devices()[:8])
        shardings = param_shardings(params, over, ShardingRules())
        with jax.set_mesh(over):
            gradient = jax.jit(jax.grad(value), out_shardings=shardings)(params, jax.device_put(x, over_groups(over)))
        np.testing.assert_array_equal(gradient["kernel"][...], 295)
        np.testing.assert_array_equal(gradient["bias"][...], 297)
