"""Sharding rules: logical axis names of parameters and arrays → mesh axes, in one place."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
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
    """A parameter with these logical axes, whole but for its `tensor` axis; its gradient goes back into the shards.

    Said where the parameter is used, inside the scan over layers: one layer is gathered at a time, and its
    gradient is reduced and scattered at once. Left to itself XLA may gather a stack of all layers, or give every
    device the whole gradient. Outside `jax.set_mesh` nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return kernel
    return _gather(kernel, ShardingRules().spec(axes), gathered_spec(axes))


def gathered_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Where a parameter with these logical axes lies once it is gathered over `fsdp`."""
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in ShardingRules().spec(axes)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(kernel: jax.Array, shards: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    del shards
    # The barrier keeps a cast to the compute dtype before the gather; XLA moves it behind and sends twice the bytes.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(kernel), whole)


def _gather_forward(kernel: jax.Array, shards: PartitionSpec, whole: PartitionSpec) -> tuple[jax.Array, None]:
    return _gather(kernel, shards, whole), None


def _gather_backward(
    shards: PartitionSpec, whole: PartitionSpec, residual: None, gradient: jax.Array
) -> tuple[jax.Array]:
    del residual
    # Summed first, then cut: told of the shards alone, XLA may split what makes the gradient as they are split, and
    # gather the activations of all groups for it.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, whole), shards),)


_gather.defvjp(_gather_forward, _gather_backward)


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
