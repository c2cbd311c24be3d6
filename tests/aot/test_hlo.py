"""Collectives are found in compiled programs, loops counted."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from maestro_jax.aot.hlo import collectives
from maestro_jax.aot.topology import GIB, refusal
from maestro_jax.parallel.mesh import MeshConfig, make_mesh


def program(body: Any, layers: int) -> str:
    """The text of a scan over weights `[layers, 8, 16]`, split over eight devices."""
    mesh = make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])
    weights = jax.ShapeDtypeStruct(
        (layers, 8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    with jax.set_mesh(mesh):
        return jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0]).lower(x, weights).compile().as_text()


def test_a_gather_in_a_loop_counts_as_often_as_the_loop_runs() -> None:
    def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        whole = jax.lax.with_sharding_constraint(w, PartitionSpec())
        return jnp.tanh(x @ whole) @ whole.T, None

    found = [c for c in collectives(program(body, 5)) if c.kind == "all-gather"]
    assert [(c.times, c.shapes, c.bytes) for c in found] == [(5, (("f32", (1, 8, 16)),), 8 * 16 * 4)]


def test_loops_within_loops_multiply() -> None:
    def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        def again(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            total = jax.lax.with_sharding_constraint(jnp.sum(x, axis=0), PartitionSpec())
            return jnp.tanh(x + total), None

        return jax.lax.scan(again, x + w[0, :8], None, length=3)[0], None

    found = [c for c in collectives(program(body, 5)) if c.kind == "all-reduce" and c.shapes == (("f32", (8,)),)]
    assert sum(c.times for c in found) == 15


def test_what_the_tpu_compiler_writes_when_it_refuses() -> None:
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.50G)"
    assert refusal(message + " exceeds available HBM (15.75G).") == (int(2.5 * GIB), int(15.75 * GIB))
    assert refusal("Ran out of memory in memory space hbm. Used 23.57G of 15.75G hbm.") == (
        int(23.57 * GIB),
        int(15.75 * GIB),
    )
    assert refusal("something else") == (0, 0)
