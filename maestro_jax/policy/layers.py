"""Building blocks of the policy: projections, norms, tables, and stacks of equal layers.

Parameters are `nnx.Param`s that carry `axes`, the logical name of each dimension; `parallel/sharding.py`
turns these into mesh axes. They are stored in the master dtype and cast to the input's dtype at use.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from maestro_jax.parallel.mesh import BATCH_AXES
from maestro_jax.parallel.sharding import (
    ShardingRules,
    gather_over_fsdp,
    keep_over_features,
    keep_param_shards,
    sum_over_batch,
)

Array = jax.Array
M = TypeVar("M", bound=nnx.Module)
C = TypeVar("C")
X = TypeVar("X")


def fan_in_normal(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int, dtype: jnp.dtype) -> Array:
    """Normal initialisation with variance 1 / fan_in (a fixed 0.02 does not train at tiny widths)."""
    return (jax.random.normal(rngs.params(), tuple(shape), jnp.float32) * fan_in**-0.5).astype(dtype)


def _widened(param: nnx.Param, dtype: jnp.dtype) -> Array:
    """A parameter rounded to the compute dtype, as fp32.

    Added or multiplied in fp32 and rounded once more, it gives the bits that the compute dtype would; but its
    gradient, a sum over all tokens, is then summed in fp32.
    """
    return _rounded(param[...], dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(x: Array, dtype: jnp.dtype) -> Array:
    """`x` rounded, as fp32; its gradient is not rounded. XLA would round before the sum over devices, not behind it."""
    return x.astype(dtype).astype(jnp.float32)


_rounded.defvjp(
    lambda x, dtype: (_rounded(x, dtype), jnp.zeros((), x.dtype)),
    lambda dtype, like, gradient: (gradient.astype(like.dtype),),
)

Axes = tuple[str | None, str | None]  # logical axes of a matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, kernel: Array, axes: Axes) -> Array:
    """`x [..., d_in] @ kernel [d_in, d_out]`, the kernel in its shards, cast to the dtype of `x` and gathered.

    The kernel's gradient is summed over rows and devices in fp32. JAX always turns the result's gradient round, and
    XLA on CPUs computes what led to that in that order, element by element: here the narrower of the two is turned.
    """
    return x @ gather_over_fsdp(kernel.astype(x.dtype), axes)


def _matmul_forward(x: Array, kernel: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, kernel, axes), (x, kernel)


def _matmul_backward(axes: Axes, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals

    def of_kernel(x: Array, gradient: Array) -> Array:
        rows, over = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if rows.shape[1] <= over.shape[1]:
            return jnp.matmul(rows.T, over, preferred_element_type=jnp.float32)
        return jnp.matmul(over.T, rows, preferred_element_type=jnp.float32).T

    shards = ShardingRules().spec(axes)
    batch = [BATCH_AXES, *[None] * (x.ndim - 2)]
    specs = [PartitionSpec(*batch, "tensor" if axis == "tensor" else None) for axis in shards]
    total = sum_over_batch(of_kernel, (x, gradient), specs, shards)
    return gradient @ gather_over_fsdp(kernel.astype(x.dtype), axes).T, total.astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); kernel `[d_in, d_out]`, the transpose of Hugging Face's weight."""

    def __init__(self, d_in: int, d_out: int, axes: Axes, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(fan_in_normal(rngs, (d_in, d_out), d_in, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype), axes=(axes[1],)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = _matmul(x, self.kernel[...], self.kernel.get_metadata("axes"))
        if self.bias is None:
            return y
        return (y.astype(jnp.float32) + _widened(self.bias, x.dtype)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in fp32, scaled after the cast back (as transformers does)."""

    def __init__(self, width: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (_widened(self.scale, x.dtype) * y.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with bias in fp32; epsilon 1e-6 throughout the vision tower."""

    def __init__(self, width: int, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((width,), dtype), axes=(None,))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table `[rows, width]`."""

    def __init__(self, rows: int, width: int, axes: tuple[str | None, str | None], dtype: jnp.dtype, rngs: nnx.Rngs):
        self.embedding = nnx.Param(fan_in_normal(rngs, (rows, width), width, dtype), axes=axes)

    def table(self, dtype: jnp.dtype) -> Array:
        """The rows cast, each of them whole on its device."""
        return gather_over_fsdp(self.embedding[...].astype(dtype), self.embedding.get_metadata("axes"))

    def __call__(self, ids: Array) -> Array:
        """Rows `[..., width]` of int32 ids, in the table's own dtype; for a small table."""
        return self.table(self.embedding[...].dtype)[ids]

    def lookups(self, ids: tuple[Array, ...], dtype: jnp.dtype) -> tuple[Array, ...]:
        """Rows `[..., width]` of each of several int32 arrays `[groups, ...]`, cast.

        The gradient of a row is a sum over all that looked it up. It is an fp32 sum whatever `dtype` is: in bf16 a
        token that is seen 2,000 times would get 256. One sum for all arrays: each on its own would fill a table.
        """
        return _looked_up(self.embedding[...], ids, self.embedding.get_metadata("axes"), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _looked_up(
    table: Array, ids: tuple[Array, ...], axes: tuple[str | None, ...], dtype: jnp.dtype
) -> tuple[Array, ...]:
    whole = gather_over_fsdp(table.astype(dtype), axes)
    return tuple(whole[each] for each in ids)


def _looked_up_forward(
    table: Array, ids: tuple[Array, ...], axes: tuple[str | None, ...], dtype: jnp.dtype
) -> tuple[tuple[Array, ...], tuple[Array, tuple[Array, ...]]]:
    return _looked_up(table, ids, axes, dtype), (table, ids)


def _looked_up_backward(
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
    residuals: tuple[Array, tuple[Array, ...]],
    gradients: tuple[Array, ...],
) -> tuple[Array, None]:
    del dtype
    table, ids = residuals
    total = jnp.zeros(table.shape, jnp.float32)
    for each, gradient in zip(ids, gradients, strict=True):
        total = total.at[each].add(keep_over_features(gradient).astype(jnp.float32))
    return keep_param_shards(total, axes).astype(table.dtype), None


_looked_up.defvjp(_looked_up_forward, _looked_up_backward)


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """`count` equal layers as one module whose parameters have a leading layer axis `[L, ...]`."""
    graphs, states = zip(*(nnx.split(make(rngs)) for _ in range(count)), strict=True)
    return nnx.merge(graphs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def unstack(stacked: M, count: int) -> list[M]:
    """The layers of a stack as separate modules."""
    graph, state = nnx.split(stacked)
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(count)]


def cast(module: M, dtype: jnp.dtype) -> M:
    """A module with its parameters in another dtype, gathered over `fsdp`: for programs that use them many times."""
    graph, state = nnx.split(module)

    def whole(param: nnx.Variable) -> nnx.Variable:
        return param.replace(gather_over_fsdp(param[...].astype(dtype), param.get_metadata("axes")))

    return nnx.merge(graph, jax.tree.map(whole, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def run_layer(layer: M, body: Callable[[M, C, X], tuple[C, Any]], carry: C, given: X, remat: bool) -> tuple[C, Any]:
    """`body(layer, carry, given)`; with `remat` the backward pass computes it again instead of keeping its inside."""
    step, state = _pure(layer, body)
    return (jax.checkpoint(step) if remat else step)(carry, (state, given))


def scan_layers(stacked: M, body: Callable[[M, C, X], tuple[C, Any]], carry: C, given: X, remat: bool) -> tuple[C, Any]:
    """Runs `body(layer, carry, given)` through a stack; its second results come back stacked `[L, ...]`.

    One layer is compiled, whatever the depth. With `remat` the backward pass keeps the carry of each
    layer only.

    Args:
      given: what each layer gets besides, stacked `[L, ...]`.
    """
    step, state = _pure(stacked, body)
    # Inside a loop XLA cannot merge the second computation with the first, so nothing need prevent it.
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, carry, (state, given))


def _pure(
    layer: M, body: Callable[[M, C, X], tuple[C, Any]]
) -> tuple[Callable[[C, tuple[nnx.State, X]], tuple[C, Any]], nnx.State]:
    graph, state = nnx.split(layer)
    return lambda carry, xs: body(nnx.merge(graph, xs[0]), carry, xs[1]), state
