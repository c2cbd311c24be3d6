"""Collectives are found in compiled programs, loops counted."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
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


# As XLA for CPUs prints a loop over five layers (jaxlib 0.12.0.1, shortened), and libtpu 0.0.50.
CPU = """\
%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt.3 = pred[] compare(%a, %b), direction=LT, metadata={op_name="jit(f)/while/cond/lt" stack_frame_id=4}
}

%body (p: (s32[], f32[1,8,16])) -> (s32[], f32[1,8,16]) {
  %p = (s32[], f32[1,8,16]{2,0,1}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[1,1,16]{2,0,1} constant({...})
  %all-gather = f32[1,8,16]{2,0,1} all-gather(%w), channel_id=1, replica_groups=mesh['fsdp'=8] {'fsdp'}, dimensions={1}
  ROOT %tuple.8 = (s32[], f32[1,8,16]{2,0,1}) tuple(%i, %all-gather)
}

%region_1.2_spmd (p.1: (s32[], f32[1,8,16])) -> pred[] {
  %p.1 = (s32[], f32[1,8,16]{2,0,1}) parameter(0)
  %constant.5.clone = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %wrapped_compare = pred[] fusion(%i.1, %constant.5.clone), kind=kLoop, calls=%compare
}

ENTRY %main.3_spmd (p.2: (s32[], f32[1,8,16])) -> (s32[], f32[1,8,16]) {
  %p.2 = (s32[], f32[1,8,16]{2,0,1}) parameter(0)
  ROOT %while.8 = (s32[], f32[1,8,16]{2,0,1}) while(%p.2), condition=%region_1.2_spmd, body=%body, \
backend_config={"dynamic_variables":[],"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"5"}}
}
"""
TPU = """\
%body (p: (s32[]{:T(128)}, f32[1,8,16])) -> (s32[], f32[1,8,16]) {
  %p = (s32[]{:T(128)}, f32[1,8,16]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = f32[1,1,16]{2,1,0:T(1,128)} constant({...})
  %all-gather = f32[1,8,16]{2,1,0:T(8,128)} all-gather(%w), channel_id=1, replica_groups={{0,1}}, dimensions={1}
  ROOT %tuple.8 = (s32[]{:T(128)}, f32[1,8,16]{2,1,0:T(8,128)}) tuple(%i, %all-gather)
}

%wide.region_1.2 (p.1: (s32[], f32[1,8,16])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5)
  %p.1 = (s32[]{:T(128)}, f32[1,8,16]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%i.1, %constant.3), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main.3 (p.2: (s32[], f32[1,8,16])) -> (s32[], f32[1,8,16]) {
  %p.2 = (s32[]{:T(128)}, f32[1,8,16]{2,1,0:T(8,128)}) parameter(0)
  ROOT %while = (s32[]{:T(128)}, f32[1,8,16]{2,1,0:T(8,128)}) while(%p.2), condition=%wide.region_1.2, body=%body
}
"""


@pytest.mark.parametrize("text", [CPU, TPU], ids=["CPU", "TPU"])
def test_loops_count_in_the_text_of_either_compiler(text: str) -> None:
    assert [(found.kind, found.times) for found in collectives(text)] == [("all-gather", 5)]


# As libtpu 0.0.42 prints sums over devices of which each keeps a part, shortened.
SCATTERED = """\
%all-reduce-scatter.2.clone.1 (input_0.2: bf16[512,1536], input_1.2: bf16[1536,512]) -> (bf16[64,1536], bf16[192,512]) {
  %input_0.2 = bf16[512,1536]{1,0:T(8,128)(2,1)} parameter(0)
  %input_1.2 = bf16[1536,512]{1,0:T(8,128)(2,1)} parameter(1)
  %all-reduce.4 = (bf16[512,1536]{1,0:T(8,128)(2,1)}, bf16[1536,512]{1,0:T(8,128)(2,1)}) all-reduce(%input_0.2, %input_1.2), channel_id=6
  %first = bf16[512,1536]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.4), index=0
  ROOT %cut = bf16[64,1536]{1,0:T(8,128)(2,1)} dynamic-slice(%first), dynamic_slice_sizes={64,1536}
}

ENTRY %main.3 (p: bf16[512,1536], q: bf16[1536,512], r: f32[1536,512]) -> f32[192,512] {
  %p = bf16[512,1536]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[1536,512]{1,0:T(8,128)(2,1)} parameter(1)
  %r = f32[1536,512]{1,0:T(8,128)} parameter(2)
  %fusion.95 = (bf16[64,1536]{1,0:T(8,128)(2,1)}, bf16[192,512]{1,0:T(8,128)(2,1)}) fusion(%p, %q), kind=kCustom, calls=%all-reduce-scatter.2.clone.1
  %collective-permute-start = (f32[1536,512]{1,0:T(8,128)}, f32[1536,512]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%r), channel_id=3
  ROOT %reduce_scatter.19 = f32[192,512]{1,0:T(8,128)} reduce-scatter(%r), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%region_5.6
}
"""  # noqa: E501


def test_what_is_summed_and_cut_is_a_reduce_scatter_of_all_that_is_summed() -> None:
    size = 512 * 1536
    assert [(found.kind, found.bytes_by_dtype) for found in collectives(SCATTERED)] == [
        ("reduce-scatter", {"bf16": 2 * size * 2}),
        ("collective-permute", {"f32": size * 4}),
        ("reduce-scatter", {"f32": size * 4}),
    ]


def test_what_the_tpu_compiler_writes_when_it_refuses() -> None:
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.50G)"
    assert refusal(message + " exceeds available HBM (15.75G).") == (int(2.5 * GIB), int(15.75 * GIB))
    assert refusal("Ran out of memory in memory space hbm. Used 23.57G of 15.75G hbm.") == (
        int(23.57 * GIB),
        int(15.75 * GIB),
    )
    assert refusal("something else") == (0, 0)
