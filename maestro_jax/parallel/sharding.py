"""Sharding rules: logical axis names of parameters and arrays → mesh axes, in one place."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from maestro_jax.errors import ConfigError
from maestro_jax.parallel.mesh import BATCH_AXES, batch_shards

HOST_MEMORY = "pinned_host"  # the memory kind of arrays that wait in a host's memory


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis of each logical parameter axis (None: replicated)."""

    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vision_embed: str | None = "fsdp"
    vision_heads: str | None = "tensor"
    vision_mlp: str | None = "tensor"

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of a parameter with these logical axes; a mesh axis may appear once only."""
        mesh_axes = tuple(None if axis is None else getattr(self, axis) for axis in axes)
        used = [axis for axis in mesh_axes if axis is not None]
        if len(set(used)) != len(used):
            raise ConfigError(f"logical axes {axes} map to {mesh_axes}: one mesh axis twice; change ShardingRules")
        return PartitionSpec(*mesh_axes)


def param_shardings(state: nnx.State, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """A `NamedSharding` for every parameter, as a tree of the state's structure.

    Stacked layers have one more leading dimension than their `axes`; it is replicated.

    Raises:
      ConfigError: a dimension does not divide over its mesh axis.
    """

    def one(path: Any, variable: nnx.Variable) -> Any:
        shape = variable.get_value().shape
        axes = tuple(variable.get_metadata("axes"))
        spec = rules.spec((None,) * (len(shape) - len(axes)) + axes)
        for size, axis in zip(shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"{jax.tree_util.keystr(path)} {shape}: {size} does not divide over mesh axis "
                    f"{axis}={mesh.shape[axis]}; choose config.mesh.{axis} among the divisors of {size}"
                )
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def param_layout(
    make: Callable[[], nnx.Module], mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A module's structure, its parameters' shapes and dtypes, and their shardings; nothing is computed."""
    graph, abstract = nnx.split(nnx.eval_shape(make), nnx.Param)
    return graph, abstract, param_shardings(abstract, mesh, rules)


def init_params(make: Callable[[], nnx.Module], mesh: Mesh, rules: ShardingRules) -> tuple[nnx.GraphDef, nnx.State]:
    """Initialises a module's parameters directly in their shards."""
    graph, _, shardings = param_layout(make, mesh, rules)
    return graph, jax.jit(lambda: nnx.split(make(), nnx.Param)[1], out_shardings=shardings)()


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def keep_over_groups(x: jax.Array) -> jax.Array:
    """Holds the leading axis (B groups, or B x M images) of an activation on the batch axes.

    Left alone, XLA rather splits activations over their features, as the weights are split, and keeps every group
    on every device. Outside `jax.set_mesh`, or where the axis does not divide (the root), nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def keep_over_features(x: jax.Array) -> jax.Array:
    """Holds an activation's last axis on `fsdp` and its leading one, the groups, on `data` alone.

    For a sum over tokens that goes into a parameter whose last axis is on `fsdp`: tokens travel (an all-to-all), every
    device sums its own columns, and no device holds the sum as a whole. Outside `jax.set_mesh` nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1 or x.shape[-1] % mesh.shape["fsdp"]:
        return x
    groups = None if x.shape[0] % mesh.shape["data"] else "data"
    return jax.lax.with_sharding_constraint(x, PartitionSpec(groups, *[None] * (x.ndim - 2), "fsdp"))


def keep_param_shards(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Holds an array in the shards of a parameter with these logical axes. Outside `jax.set_mesh` nothing is done."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ShardingRules().spec(axes))


def keep_over_heads(x: jax.Array, axis: int) -> jax.Array:
    """Holds keys or values with their heads, axis `axis`, on `tensor`, and the axis of shards D before them, if any.

    As the projections that make them: every device keeps and reads the heads that it computes. Outside `jax.set_mesh`
    nothing is done; heads that do not divide over `tensor` are whole everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, heads_spec(mesh, x.shape, axis))


def heads_spec(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], axis: int) -> PartitionSpec:
    """Where `keep_over_heads` puts an array of this shape."""
    spec: list[Any] = [None] * len(shape)
    spec[0] = BATCH_AXES
    spec[axis] = "tensor" if shape[axis] % mesh.shape["tensor"] == 0 else None
    return PartitionSpec(*spec)


def gather_over_fsdp(kernel: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter with these logical axes, whole but for its `tensor` axis.

    Said where the parameter is used, inside the scan over layers: one layer is gathered at a time. Left to itself XLA
    may gather a stack of all layers. Outside `jax.set_mesh` nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return kernel
    # The barrier keeps a cast to the compute dtype before the gather; XLA moves it behind and sends twice the bytes.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(kernel), gathered_spec(axes))


def gathered_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Where a parameter with these logical axes lies once it is gathered over `fsdp`."""
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in ShardingRules().spec(axes)))


def sum_over_batch(
    terms: Callable[..., jax.Array],
    operands: Sequence[jax.Array],
    specs: Sequence[PartitionSpec],
    shards: PartitionSpec,
) -> jax.Array:
    """`terms(*operands)`, a sum over the batch such as a parameter's gradient, added up over devices into shards.

    Every device computes `terms` of its own part of the batch; these are summed in their dtype (fp32), within `fsdp` by
    a reduce-scatter, then over `data`. Left to itself, XLA sums over devices in a product's dtype, and may
    give every device the whole sum.

    Args:
      specs: of the operands, that of the first with `BATCH_AXES`; where the batch does not divide over them (the root),
        every device has all of it.
      shards: of the sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return terms(*operands)
    divides = operands[0].shape[specs[0].index(BATCH_AXES)] % batch_shards(mesh) == 0
    if not divides:
        specs = [PartitionSpec(*(None if axis == BATCH_AXES else axis for axis in spec)) for spec in specs]
    cut = shards.index("fsdp") if "fsdp" in shards else None

    def on_device(*parts: jax.Array) -> jax.Array:
        total = terms(*parts)
        if cut is not None and mesh.shape["fsdp"] > 1:
            pieces = jnp.moveaxis(total, cut, 0)
            pieces = pieces.reshape(mesh.shape["fsdp"], -1, *pieces.shape[1:])  # a piece for each shard
            if divides:
                piece = _scattered(pieces, "fsdp", mesh.shape["fsdp"])
            else:
                piece = jax.lax.dynamic_index_in_dim(pieces, jax.lax.axis_index("fsdp"), keepdims=False)
            total = jnp.moveaxis(piece, 0, cut)
        left = ("data",) if cut is not None else BATCH_AXES
        over = tuple(axis for axis in left if mesh.shape[axis] > 1)  # XLA would run one over groups of one device, too
        return jax.lax.psum(total, over) if divides and over else total

    return jax.shard_map(on_device, in_specs=tuple(specs), out_specs=shards, check_vma=False)(*operands)


def _scattered(pieces: jax.Array, axis: str, size: int) -> jax.Array:
    """The sum over a mesh axis of `pieces [size, ...]`, piece i on device i, `[...]`; in a manual region.

    In two steps, over rows and over columns of the axis folded into a rectangle: the bytes sent are the same. Where the
    axis lies in two or three dimensions of a slice, the TPU compiler turns one reduce-scatter over all of it into an
    all-reduce of everything, which sends twice the bytes (seen with libtpu 0.0.42 for v5e:8x8, v5p:2x2x2 and v6e:4x4).
    """
    rows = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    devices = np.arange(size).reshape(rows, size // rows)
    for groups in (devices.T, devices):
        pieces = jax.lax.psum_scatter(pieces, axis, tiled=True, axis_index_groups=groups.tolist())
    return pieces[0]


def from_processes(local: Any, shardings: Any) -> Any:
    """Arrays on the mesh; what lies over processes each has its own part of, the rest is the same in all.

    Args:
      local: a tree of numpy arrays.
      shardings: of them, as a tree or a prefix of one.
    """
    if jax.process_count() == 1:
        return jax.device_put(local, shardings)

    def place(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), part)

    return jax.tree.map(place, shardings, local)


def from_everyone(whole: Any, shardings: Any) -> Any:
    """Arrays on the mesh, of numpy arrays that all processes have as a whole; see `from_processes`."""

    def place(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), part)

    return jax.tree.map(place, shardings, whole)


def over_groups(mesh: Mesh) -> NamedSharding:
    """Leading axis B (or B x M images) spread over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))
