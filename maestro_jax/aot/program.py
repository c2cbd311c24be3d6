"""One program compiled ahead of time, and what the compiler says of it."""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from maestro_jax.aot.hlo import KINDS, Collective, collectives
from maestro_jax.aot.topology import refusal
from maestro_jax.aot.traffic import moved

# TPU programs compile six times as fast so, and need nearly the same memory (docs/performance.md).
# jax 0.11.1 knows levels of effort instead of its amount.
QUICK: dict[str, float | str] = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O0"}
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind.

    Attributes:
      runs: how many run.
      by_dtype: "f32" and the like → bytes of all runs.
    """

    runs: int
    by_dtype: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.by_dtype.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, a device.

    Attributes:
      arguments, temporaries: bytes; what comes in (donated buffers, which results take over, counted once), and what
        exists while it runs. Results that take over no argument are among the temporaries.
      beside: bytes of the run's other arrays that stay on the device meanwhile.
      refused: whether the compiler found that it does not fit; then `temporaries` is all it says it needs.
      flops: operations of matrix products by arithmetic (`policy/flops.py`); 0 where they do not count.
      collectives: kind → runs and bytes by dtype, loops counted; what is counted: `hlo.Collective`.
      largest_gather: bytes of the largest result of an all-gather; a stack of all layers would show.
      kernels: whether splash attention is in the program.
      seconds: it took to compile.
      token_bytes: bytes to and from memory for each token that all lanes decode, as counted in a TPU's program.
      least_token_bytes: those that it cannot do without. Both are 0 for programs that decode nothing.
    """

    name: str
    arguments: int
    temporaries: int
    beside: int
    refused: bool
    flops: float
    collectives: dict[str, Traffic]
    largest_gather: int
    kernels: bool
    seconds: float
    token_bytes: int = 0
    least_token_bytes: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.beside

    def fits(self, limit: int) -> bool:
        return not self.refused and (not limit or self.total <= limit)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a program decodes.

    Attributes:
      chunk: tokens a call.
      least: bytes to and from memory that each of them needs.
    """

    chunk: int
    least: int


def compile_program(
    name: str,
    function: Any,
    arguments: tuple,
    held: Sequence[Any],
    flops: float,
    options: dict[str, Any],
    decoded: Decoded | None = None,
) -> Program:
    """Compiles a jitted function for the mesh that is set.

    Args:
      held: trees of the arrays that the run has at that time; some may be arguments.
      options: of the compiler.
    """
    began = time.monotonic()
    given = bytes_on_device(arguments)
    others = {id(tree): tree for tree in held if not any(tree is argument for argument in arguments)}
    beside = bytes_on_device(list(others.values()))
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed, _ = refusal(str(error))
        if not needed:
            raise
        left = max(needed - given, 0)
        return Program(name, given, left, beside, True, flops, {}, 0, False, time.monotonic() - began)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = collectives(text)
    return Program(
        name=name,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        # Arguments that a program does not use are not among its own, but they are there.
        beside=beside + max(given - memory.argument_size_in_bytes, 0),
        refused=False,
        flops=flops,
        collectives=_by_kind(found),
        largest_gather=max((c.bytes for c in found if c.kind == "all-gather"), default=0),
        kernels="splash_mha" in text,
        seconds=time.monotonic() - began,
        token_bytes=moved(text) // decoded.chunk if decoded else 0,
        least_token_bytes=decoded.least if decoded else 0,
    )


def _by_kind(found: list[Collective]) -> dict[str, Traffic]:
    traffic = {}
    for kind in KINDS:
        if of_kind := [c for c in found if c.kind == kind]:
            by_dtype: dict[str, int] = defaultdict(int)
            for each in of_kind:
                for dtype, size in each.bytes_by_dtype.items():
                    by_dtype[dtype] += each.times * size
            traffic[kind] = Traffic(sum(c.times for c in of_kind), dict(by_dtype))
    return traffic


def bytes_on_device(tree: Any) -> int:
    """Of the arrays that live in a device's own memory, on one device."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind in (None, "device")]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
