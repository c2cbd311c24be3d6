"""Compiles four layers with sharded weights for the slice that is named, and prints what libtpu made of it.

With LIBTPU_INIT_ARGS as it is in the environment: run in a process of its own, since libtpu reads them once.
"""

import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maestro_jax.aot.topology import tpu_target

LAYERS, WIDTH, HIDDEN, LENGTH = 4, 512, 2048, 512


def loss(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, sharded: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        up, down = (jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), P()) for w in sharded)
        return x + jax.nn.silu(x @ up) @ down, None

    x, _ = jax.lax.scan(layer, x, weights)
    return (x.astype(jnp.float32) ** 2).mean()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    devices = tpu_target(sys.argv[1]).devices
    mesh = Mesh(devices, ("fsdp",))

    def array(shape: tuple[int, ...], dtype: jnp.dtype, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    weights = (
        array((LAYERS, WIDTH, HIDDEN), jnp.float32, None, "fsdp"),
        array((LAYERS, HIDDEN, WIDTH), jnp.float32, None, "fsdp"),
    )
    x = array((len(devices), LENGTH, WIDTH), jnp.bfloat16, "fsdp")
    with jax.set_mesh(mesh):
        text = jax.jit(loss).lower(weights, x).compile().as_text()
    print("beside" if re.search(r"async-collective-start|all-gather-start|call-start", text) else "one after the other")
