"""AdamW, and how its two moments are kept between steps: in fp32, in bfloat16 or in a byte each.

optax computes the update, in fp32 whatever the moments are kept in; its own `mu_dtype` narrows the first moment only.
What is kept narrower is rounded *stochastically*: up or down, with the probability that leaves the mean right. Rounded
to the nearest, a moment stops following its gradients once a step changes it by less than half of its last place. In
bfloat16 that is 0.2 to 0.4 %, and a second moment that should fall by the factor b2 = 0.999 a step would never fall.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

MOMENTS = ("float32", "bfloat16", "int8")

# Levels of a byte are powers of 2 ** (1 / 8), 9 % apart: the sign and 127 of them span 16 octaves of the first moment,
# 255 span 32 octaves of the second, so that the root of the second reaches as far down as the first.
_LEVELS_PER_OCTAVE = 8


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a global-norm clip; the rate warms up linearly and, if `decay_steps` is not 0, falls to 0 by then.

    `moments`: how each of the two moments is kept, "float32" (4 bytes a parameter), "bfloat16" (2) or "int8" (1, and
    4 a row of the parameter's last axis; `quantise`).
    `offload`: whether the moments stay in the host's memory between updates (`update.py: init_train_state`).
    """

    learning_rate: float
    warmup_steps: int
    decay_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    moments: str = "float32"
    offload: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """One moment of all parameters in bytes: the level of each element, and what a row's highest level stands for."""

    levels: Any  # a tree like the parameters; int8 (first moment) or uint8 (second) of the parameter's shape
    scales: Any  # a tree like the parameters; float32 [..., 1]


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
    """optax's Adam in fp32, its moments kept as `moments` (of `MOMENTS`) says, whatever the dtype of the parameters."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: Any) -> optax.ScaleByAdamState:
        return _keep(adam.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)), moments)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        updates, state = adam.update(gradients, state._replace(mu=_take(state.mu), nu=_take(state.nu)), params)
        return updates, _keep(state, moments)

    return optax.GradientTransformation(init, update)


def _keep(state: Any, moments: str) -> Any:
    """An Adam state with fp32 moments as it is kept; the chance in its rounding depends on its step, on no mesh."""
    if moments == "float32":
        return state
    mu_seed, nu_seed = 2 * state.count, 2 * state.count + 1
    if moments == "bfloat16":
        mu, nu = (
            _map_by_chance(round_to_bfloat16, mu_seed, state.mu),
            _map_by_chance(round_to_bfloat16, nu_seed, state.nu),
        )
    else:
        mu, nu = _quantised(state.mu, jnp.int8, mu_seed), _quantised(state.nu, jnp.uint8, nu_seed)
    return state._replace(mu=mu, nu=nu)


def _take(moment: Any) -> Any:
    """A moment as it is kept → in fp32."""
    if isinstance(moment, Quantised):
        return jax.tree.map(dequantise, moment.levels, moment.scales)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moment)


def _quantised(moment: Any, dtype: Any, seed: Array) -> Quantised:
    scales = jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf), axis=-1, keepdims=True), moment)
    return Quantised(_map_by_chance(lambda *leaves: quantise(*leaves, dtype), seed, moment, scales), scales)


def _map_by_chance(function: Callable[..., Array], seed: Array, tree: Any, *more: Any) -> Any:
    """`function(chance, leaf, ...)` of every leaf; `chance` is uint32 of the leaf's shape, below 2 ** 16."""
    leaves, structure = jax.tree.flatten(tree)
    chances = [hashed(_mix(seed.astype(jnp.uint32)) + i, leaf.shape) >> 16 for i, leaf in enumerate(leaves)]
    return jax.tree.map(function, jax.tree.unflatten(structure, chances), tree, *more)


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


def round_to_bfloat16(chance: Array, x: Array) -> Array:
    """fp32 `x` as bfloat16, rounded stochastically: the 16 bits that are cut off carry into the others by `chance`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def quantise(chance: Array, x: Array, scale: Array, dtype: Any) -> Array:
    """Levels of fp32 `x` as bytes, rounded stochastically between neighbouring levels.

    Level 0 is 0, the highest is `scale`, each of the others 9 % above the one before. Block-wise 8-bit Adam (Dettmers
    et al. 2022, arXiv 2110.02861) needs small blocks since its levels are finest near the largest element; these are
    equally fine everywhere, so that a row as a whole, which may be split over devices, is block enough.

    Args:
      chance: uint32 below 2 ** 16, in the shape of `x`.
      x: at most `scale [..., 1]` in size; none is below 0 if `dtype` is unsigned.
      dtype: int8, or uint8 for second moments: there nothing above 0 becomes 0, by whose root it would be divided.
    """
    highest = jnp.iinfo(dtype).max
    size = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0)
    low = jnp.clip(jnp.floor(highest + _LEVELS_PER_OCTAVE * jnp.log2(size)), 0, highest - 1)
    below, above = _value(low, highest), _value(low + 1, highest)
    up = chance < (size - below) / (above - below) * 2.0**16
    if dtype == jnp.uint8:
        up |= (low == 0) & (size > 0)
    return (jnp.sign(x) * (low + up)).astype(dtype)


def dequantise(levels: Array, scale: Array) -> Array:
    """fp32 values of what `quantise` made."""
    size = _value(jnp.abs(levels.astype(jnp.float32)), jnp.iinfo(levels.dtype).max)
    return jnp.sign(levels).astype(jnp.float32) * size * scale


def _value(level: Array, highest: int) -> Array:
    """What a level stands for, where the highest stands for 1."""
    return jnp.where(level == 0, 0.0, jnp.exp2((level - highest) / _LEVELS_PER_OCTAVE))
