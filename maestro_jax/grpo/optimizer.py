"""AdamW, and how its two moments are kept between steps: in fp32, in bfloat16 or in a byte each.

optax computes the update, in fp32 whatever the moments are kept in; its own `mu_dtype` narrows the first moment only.
What is kept narrower is rounded *stochastically*: up or down, with the probability that leaves the mean right. Rounded
to the nearest, a moment stops following its gradients once a step changes it by less than half of its last place. In
bfloat16 that is 0.2 to 0.4 %, and a second moment that should fall by the factor b2 = 0.999 a step would never fall.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maestro_jax.grpo.config import OptimizerConfig

Array = jax.Array

# Levels of a byte are powers of 2 ** (1 / 8), 9 % apart: the sign and 127 of them span 16 octaves of the first moment,
# 255 span 32 octaves of the second, so that the root of the second reaches as far down as the first.
_LEVELS_PER_OCTAVE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A moment of one parameter in bytes: the level of each element, and what a row's highest level stands for."""

    levels: Any  # int8 (first moment) or uint8 (second), in the parameter's shape; or its sharding, as of
    scales: Any  # float32 [..., 1]


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    rate, warmup = config.learning_rate, max(config.warmup_steps, 1)
    schedule = optax.linear_schedule(rate / warmup, rate, warmup)
    if config.decay_steps:
        schedule = optax.warmup_cosine_decay_schedule(rate / warmup, rate, warmup, config.decay_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.b1, config.b2, config.eps, config.moments),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def scale_by_adam(b1: float, b2: float, eps: float, moments: str) -> optax.GradientTransformation:
    """optax's Adam in fp32, its moments kept as `moments` says, whatever the dtype of the parameters."""
    adam = optax.scale_by_adam(b1, b2, eps)
    first, second = ("int8", "uint8") if moments == "int8" else (moments, moments)

    def keep(state: Any) -> Any:
        # The rounding depends on step, parameter and element, on no mesh.
        seed = 2 * state.count.astype(jnp.uint32)
        return state._replace(mu=_narrow(state.mu, first, seed), nu=_narrow(state.nu, second, seed + 1))

    def init(params: Any) -> Any:
        return keep(adam.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
        updates, state = adam.update(gradients, state._replace(mu=_widen(state.mu), nu=_widen(state.nu)), params)
        return updates, keep(state)

    return optax.GradientTransformation(init, update)


def _widen(moments: Any) -> Any:
    """Moments as they are kept → in fp32."""

    def one(leaf: Array | Quantised) -> Array:
        return dequantise(leaf) if isinstance(leaf, Quantised) else leaf.astype(jnp.float32)

    return jax.tree.map(one, moments, is_leaf=lambda x: isinstance(x, Quantised))


def _narrow(moments: Any, dtype: str, seed: Array) -> Any:
    """Moments in fp32 → as they are kept."""

    def one(number: int, leaf: Array) -> Array | Quantised:
        if dtype == "float32":
            return leaf
        chance = hashed(_mix(seed) + jnp.uint32(number), leaf.shape) >> 16
        return round_to_bfloat16(leaf, chance) if dtype == "bfloat16" else quantise(leaf, dtype, chance)

    leaves, structure = jax.tree.flatten(moments)
    return jax.tree.unflatten(structure, [one(number, leaf) for number, leaf in enumerate(leaves)])


def hashed(seed: Array, shape: Sequence[int]) -> Array:
    """uint32 that look random, of an element's index and a seed.

    Rounding needs no better, and a generator of random numbers (a hundred operations an element with Threefry) would be
    most of the update's work, and of its compilation. Every device makes its own shard's.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(index + _mix(seed))


def _mix(x: Array) -> Array:
    """A bijection of uint32 in which every bit of the result depends on every bit of `x` (lowbias32, Wellons 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def round_to_bfloat16(x: Array, chance: Array) -> Array:
    """fp32 `x` as bfloat16, rounded stochastically: the 16 bits that are cut off carry into the others by `chance`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def quantise(x: Array, dtype: str, chance: Array) -> Quantised:
    """fp32 `x` in bytes, rounded stochastically between neighbouring levels.

    Level 0 is 0, the highest is the row's largest element, each of the others 9 % above the one before. Block-wise
    8-bit Adam (Dettmers et al. 2022, arXiv 2110.02861) needs small blocks since its levels are finest near a block's
    largest element; these are equally fine everywhere, so that a whole row, which may be split over devices, will do.

    Args:
      dtype: "int8", or "uint8" for second moments: none is below 0, and none above 0 becomes 0, for updates are divided
        by their roots.
      chance: uint32 below 2 ** 16, in the shape of `x`.
    """
    highest = jnp.iinfo(dtype).max
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    size = jnp.abs(x) / jnp.where(scales > 0, scales, 1.0)
    low = jnp.clip(jnp.floor(highest + _LEVELS_PER_OCTAVE * jnp.log2(size)), 0, highest - 1)
    below, above = _value(low, highest), _value(low + 1, highest)
    up = chance < (size - below) / (above - below) * 2.0**16
    if dtype == "uint8":
        up |= (low == 0) & (size > 0)
    return Quantised((jnp.sign(x) * (low + up)).astype(dtype), scales)


def dequantise(x: Quantised) -> Array:
    """The fp32 values of what `quantise` made."""
    size = _value(jnp.abs(x.levels.astype(jnp.float32)), jnp.iinfo(x.levels.dtype).max)
    return jnp.sign(x.levels).astype(jnp.float32) * size * x.scales


def _value(level: Array, highest: int) -> Array:
    """What a level stands for, where the highest stands for 1."""
    return jnp.where(level == 0, 0.0, jnp.exp2((level - highest) / _LEVELS_PER_OCTAVE))
