"""The update's memory on GPUs by arithmetic: there is no compiler for a GPU that is not there.

Counted are parameters, moments, what a recomputing scan keeps, one layer at work, and the head's chunk. Kernels' own
buffers and fragmentation are not; a tenth of a device's memory is left for them. Rates: NVIDIA's data sheets of the SXM
models (dense bf16; NVLink both directions).
"""

import math

import jax.numpy as jnp

from maestro_jax.aot.program import Program
from maestro_jax.aot.run import RunSizes
from maestro_jax.aot.topology import GIB, Rates, Target
from maestro_jax.config import Config
from maestro_jax.errors import ConfigError
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.policy.flops import group_flops, root_flops

_USABLE = 0.9
_GPUS = {
    "a100": (80 * GIB, Rates(312e12, 2039e9, 600e9)),
    "h100": (80 * GIB, Rates(989e12, 3350e9, 900e9)),
    "h200": (141 * GIB, Rates(989e12, 4800e9, 900e9)),
}
_MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def gpu_target(name: str) -> Target | None:
    """Devices of "h100:8" and the like, None for another name.

    Raises:
      ConfigError: no number follows.
    """
    kind, _, count = name.partition(":")
    if kind not in _GPUS:
        return None
    if not count.isdigit() or int(count) < 1:
        raise ConfigError(f"--topology {name!r}: how many? Write {kind}:8")
    memory, rates = _GPUS[kind]
    return Target(name, (), f"NVIDIA {kind.upper()}", int(memory * _USABLE), rates, int(count))


def estimate_update(config: Config, architecture: PolicyArchitecture, sizes: RunSizes, target: Target) -> Program:
    """The train step on each of the target's devices.

    Raises:
      ConfigError: the groups do not divide over the devices.
    """
    policy, text = config.policy, architecture.text
    tensor = config.mesh.tensor
    shards = target.count // tensor
    if shards < 1 or sizes.microbatch % shards:
        raise ConfigError(
            f"config.grpo.groups / microbatches = {sizes.microbatch} does not divide over {shards} devices; "
            f"set it to a multiple of {shards}"
        )
    count = parameters(architecture)
    master, compute = jnp.dtype(policy.param_dtype).itemsize, jnp.dtype(policy.compute_dtype).itemsize
    moments = 0 if config.optimizer.offload else 2 * _MOMENT_BYTES[config.optimizer.moments]
    arguments = count * (master + moments) / target.count
    tokens = sizes.microbatch // shards * (sizes.prefix + sizes.members * sizes.room) + sizes.root
    inside = tokens * (3 * text.intermediate_size + 6 * text.num_attention_heads * text.head_dim) * compute / tensor
    kept = text.num_hidden_layers * (tokens * text.hidden_size * compute if policy.remat else inside)
    layer = 2 * count / text.num_hidden_layers * compute / tensor  # gathered weights and their gradient
    table = text.vocab_size * text.hidden_size * (compute + 4) / tensor
    head = 3 * sizes.microbatch // shards * sizes.members * config.grpo.logprob_chunk * text.vocab_size * 4 / tensor
    gradients = count * master / target.count
    group = group_flops(
        architecture, sizes.root, sizes.prefix, sizes.members, sizes.room, sizes.images, sizes.patches
    ).total
    flops = sizes.microbatch // shards * group + root_flops(architecture, sizes.root).total
    return Program(
        name="update (estimated)",
        arguments=int(arguments),
        temporaries=int(kept + 2 * inside + layer + table + head + gradients),
        beside=int(count * master / target.count) if config.grpo.kl_weight else 0,
        refused=False,
        flops=flops * (4 if policy.remat else 3) / tensor,
        collectives={},
        largest_gather=0,
        kernels=False,
        seconds=0.0,
    )


def parameters(architecture: PolicyArchitecture) -> int:
    """Weights of all matrices (biases and norms are left out: less than a thousandth)."""
    text, vision = architecture.text, architecture.vision
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * heads + 2 * kv + 3 * text.intermediate_size)
    tables = text.vocab_size * text.hidden_size * (1 if architecture.tie_word_embeddings else 2)
    joined = vision.hidden_size * vision.spatial_merge_size**2
    merger = joined * (joined + vision.out_hidden_size)
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    mergers = 1 + len(vision.deepstack_visual_indexes)
    patch = math.prod(vision.patch_shape) * vision.hidden_size
    tower = vision.depth * block + mergers * merger + patch
    return text.num_hidden_layers * layer + tables + tower + vision.num_position_embeddings * vision.hidden_size
