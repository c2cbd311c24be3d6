"""The compiled programs of a rollout, with parameters in place of the policy; what they change is donated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from maestro_jax.parallel.sharding import ShardingRules, gather_over_fsdp
from maestro_jax.rollout import decode, moves
from maestro_jax.rollout.decode import DecodeConfig
from maestro_jax.rollout.state import Sizes, empty_lanes, empty_pages

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RolloutPrograms:
    """Jitted functions; those of `rollout/decode.py` take weights as `weights` makes them."""

    weights: Any  # params → weights
    open: Any  # (weights, root) → (groups, lanes, pages)
    with_root: Any
    prefill: Any
    decode: Any
    append: Any
    seat: Any
    park: Any
    load: Any
    unload: Any
    bring_back: Any


def rollout_programs(graph: nnx.GraphDef, sizes: Sizes, config: DecodeConfig) -> RolloutPrograms:
    def on_policy(function: Callable, **static: object) -> Callable:
        return lambda weights, *args: function(nnx.merge(graph, weights), *args, **static)

    def open_session(weights: nnx.State, root: Array) -> tuple:
        policy = nnx.merge(graph, weights)
        text, dtype = policy.architecture.text, policy.compute_dtype
        groups = decode.open_groups(policy, root, sizes)
        return groups, empty_lanes(sizes, text, dtype), empty_pages(sizes, text, dtype)

    seat = functools.partial(moves.seat_lanes, sizes=sizes)
    return RolloutPrograms(
        weights=functools.partial(decoding_weights, graph),
        open=jax.jit(open_session),
        with_root=jax.jit(on_policy(decode.with_root), donate_argnums=1),
        prefill=jax.jit(on_policy(decode.prefill), donate_argnums=1),
        decode=jax.jit(on_policy(decode.decode_chunk, sizes=sizes, config=config), donate_argnums=2),
        append=jax.jit(on_policy(decode.append_observations, sizes=sizes), donate_argnums=2),
        seat=jax.jit(seat, donate_argnums=1),
        park=jax.jit(moves.park, donate_argnums=1),
        load=jax.jit(moves.load, donate_argnums=0),
        unload=jax.jit(moves.unload),
        bring_back=jax.jit(moves.bring_back, donate_argnums=0),
    )


def decoding_weights(graph: nnx.GraphDef, params: nnx.State) -> nnx.State:
    """The decoder's parameters in the compute dtype, whole but for their `tensor` axis; the vision tower's as they are.

    Cast and gathered once for all programs of a rollout. What needs neither is the trainer's own buffer: nothing is
    copied. (Through jit it would be: a result is never the buffer of an argument that is not donated.)
    """
    dtype = nnx.merge(graph, params).compute_dtype
    shards = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)

    def whole(path: tuple[Any, ...], param: nnx.Variable) -> nnx.Variable:
        axes = tuple(param.get_metadata("axes"))
        gathered = shards > 1 and ShardingRules().embed in ShardingRules().spec(axes)
        if jax.tree_util.keystr(path[:1], simple=True) == "visual" or not (gathered or param[...].dtype != dtype):
            return param
        return param.replace(_cast_and_gather(param[...], axes, dtype))

    return jax.tree_util.tree_map_with_path(whole, params, is_leaf=_is_param)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast_and_gather(value: Array, axes: tuple[str | None, ...], dtype: Any) -> Array:
    stacked = (None,) * (value.ndim - len(axes))
    return gather_over_fsdp(value.astype(dtype), (*stacked, *axes))


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
