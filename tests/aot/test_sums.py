"""What the TPU compiler makes of sums over devices: fp32, each device gets its part."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maestro_jax.aot.hlo import collectives
from maestro_jax.aot.topology import tpu_target
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.parallel.sharding import ShardingRules, over_groups, param_layout
from maestro_jax.policy.layers import Linear

D_IN, D_OUT = 512, 1024


@pytest.mark.parametrize(("topology", "data"), [("v6e:4x4", 1), ("v5p:2x2x2", 2)])
def test_a_gradient_in_bf16_is_scattered_in_fp32(topology: str, data: int) -> None:
    """A single reduce-scatter over a plane of chips would be an all-reduce of everything."""
    devices = tpu_target(topology).devices
    mesh = make_mesh(MeshConfig(data, -1, 1), devices)

    def layer() -> Linear:
        return Linear(D_IN, D_OUT, ("embed", "mlp"), True, jnp.dtype(jnp.float32), nnx.Rngs(0))

    graph, shapes, shardings = param_layout(layer, mesh, ShardingRules())
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    x = jax.ShapeDtypeStruct((len(devices), 128, D_IN), jnp.bfloat16, sharding=over_groups(mesh))

    def value(params: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x).astype(jnp.float32)))

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(value), out_shardings=shardings)
        text = gradient.lower(params, x).compile(compiler_options={"exec_time_optimization_effort": -1.0}).as_text()
    sums = [c for c in collectives(text) if c.kind in ("all-reduce", "reduce-scatter")]
    assert {dtype for c in sums for dtype, _ in c.shapes} == {"f32"}
    sent = {kind: sum(c.bytes for c in sums if c.kind == kind) for kind in ("all-reduce", "reduce-scatter")}
    whole, fsdp = D_IN * D_OUT * 4, len(devices) // data
    rows = {16: 4, 4: 2}[fsdp]  # in two steps: everything over rows of devices, then what is left over columns
    assert sent["reduce-scatter"] == whole + whole // (fsdp // rows)
    bias = D_OUT * 4
    assert sent["all-reduce"] == bias + (whole // fsdp if data > 1 else 0)
