"""The compiled programs of a rollout, with arrays in place of modules; what they change is donated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maestro_jax.parallel.sharding import ShardingRules
from maestro_jax.policy.model import DecodingPolicy
from maestro_jax.rollout import decode, moves
from maestro_jax.rollout.decode import DecodeConfig
from maestro_jax.rollout.state import RolloutSizes, empty_lanes, empty_pages

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["start", "end", "shape", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class PackedField:
    """A field of packed rows int32 `[D, N]`, cut out by the program that uses it.

    Every array that a program gives back costs its caller time; the exchange gives back one.
    """

    packed: Array
    start: int
    end: int
    shape: tuple[int, ...]  # in one row
    dtype: np.dtype

    def cut(self) -> Array:
        rows = self.packed[:, self.start : self.end].reshape(-1, *self.shape)
        return jax.lax.bitcast_convert_type(rows, self.dtype)


def _cut_fields(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.cut() if _is_packed(x) else x, tree, is_leaf=_is_packed)


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedField)


@dataclasses.dataclass(frozen=True)
class RolloutPrograms:
    """Jitted functions. What encodes prompts takes the trainer's parameters, what decodes takes `Weights` of them.

    Where they take arrays of orders, they also take a `PackedField`.
    """

    weights: Any  # params → Weights
    open: Any  # (params, root) → (groups, lanes, pages)
    with_root: Any
    prefill: Any
    decode: Any
    append: Any
    assign: Any
    park: Any
    load: Any
    unload: Any
    bring_back: Any


def rollout_programs(graph: nnx.GraphDef, sizes: RolloutSizes, config: DecodeConfig) -> RolloutPrograms:
    def on_policy(function: Callable) -> Callable:
        return lambda params, *args: function(nnx.merge(graph, params), *_cut_fields(args))

    def on_decoder(function: Callable, **static: object) -> Callable:
        return lambda weights, *args: function(_decoder(graph, weights), *_cut_fields(args), **static)

    def on_lanes(function: Callable, **static: object) -> Callable:
        return lambda *args: function(*_cut_fields(args), **static)

    def open_session(params: nnx.State, root: Array) -> tuple:
        policy = nnx.merge(graph, params)
        text, dtype = policy.architecture.text, policy.compute_dtype
        groups = decode.open_groups(policy, root, sizes)
        return groups, empty_lanes(sizes, text, dtype), empty_pages(sizes, text, dtype)

    return RolloutPrograms(
        weights=functools.partial(decoding_weights, graph),
        open=jax.jit(open_session),
        with_root=jax.jit(on_policy(decode.with_root), donate_argnums=1),
        prefill=jax.jit(on_policy(decode.prefill), donate_argnums=1),
        decode=jax.jit(on_decoder(decode.decode_chunk, sizes=sizes, config=config), donate_argnums=2),
        append=jax.jit(on_decoder(decode.append_observations, sizes=sizes), donate_argnums=2),
        assign=jax.jit(on_lanes(moves.assign_lanes, sizes=sizes), donate_argnums=1),
        park=jax.jit(on_lanes(moves.park), donate_argnums=1),
        load=jax.jit(on_lanes(moves.load), donate_argnums=0),
        unload=jax.jit(on_lanes(moves.unload)),
        bring_back=jax.jit(on_lanes(moves.bring_back), donate_argnums=0),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """A structure of arrays that is compared by identity, at no cost."""

    of: Any


_structure = functools.lru_cache(maxsize=16)(Structure)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class Weights:
    """What decoding takes of the parameters: a `DecodingPolicy`, or the parameters themselves.

    A plain list, since the host takes arguments apart whenever it calls a program: 1.6 ms for 36 layers of modules.
    """

    leaves: list[Array]
    structure: Structure

    @classmethod
    def of(cls, whole: DecodingPolicy | nnx.State) -> "Weights":
        leaves, structure = jax.tree.flatten(whole)
        return cls(leaves, _structure(structure))

    def whole(self) -> DecodingPolicy | nnx.State:
        return jax.tree.unflatten(self.structure.of, self.leaves)


def decoding_weights(graph: nnx.GraphDef, params: nnx.State) -> Weights:
    """The decoder cut into layers, in the compute dtype, whole but for its `tensor` axis: once for a rollout.

    Programs that cut it themselves would hold and copy the stacked layers once more, each time they are called (6.7 GB
    of the 4B). They do where nothing is to be cast or gathered: then these are the trainer's own buffers.
    """
    return Weights.of(params if _ready(params, nnx.merge(graph, params).compute_dtype) else _cut(graph, params))


def _ready(params: nnx.State, dtype: jnp.dtype) -> bool:
    """Whether all parameters of the decoder are in this dtype, and whole on their device."""
    shards, rules = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1), ShardingRules()

    def ready(path: tuple[Any, ...], param: nnx.Variable) -> bool:
        gathered = shards > 1 and rules.embed in rules.spec(tuple(param.get_metadata("axes")))
        in_vision = jax.tree_util.keystr(path[:1], simple=True) == "visual"
        return in_vision or not (gathered or param[...].dtype != dtype)

    return all(jax.tree.leaves(jax.tree_util.tree_map_with_path(ready, params, is_leaf=_is_param)))


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _decoder(graph: nnx.GraphDef, weights: Weights) -> DecodingPolicy:
    whole = weights.whole()
    return _cut(graph, whole) if isinstance(whole, nnx.State) else whole


@functools.partial(jax.jit, static_argnums=0)
def _cut(graph: nnx.GraphDef, params: nnx.State) -> DecodingPolicy:
    return nnx.merge(graph, params).for_decoding()
