"""Says, before a slice is asked for, whether a run's mesh and batches divide over it.

    python -m maestro_jax.slice_check --config configs/qwen3_vl_4b.py --accelerator v5litepod-64 [--config.KEY=VALUE]

Arithmetic on shapes: no device is touched, no weights are read. One line and exit code 0 if all is well, one line
with the cure and 78 if not. Whether it fits into memory, `maestro_jax.plan` says.
"""

import dataclasses
from collections.abc import Sequence

import jax
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import config_flags

from maestro_jax import command
from maestro_jax.aot.slices import Slice, parse_accelerator
from maestro_jax.assemble import check_batches, known_architecture, policy_factory
from maestro_jax.config import Config, parse_config
from maestro_jax.parallel.mesh import axis_sizes, batch_shards
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy.config import PolicyArchitecture

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file with get_config().", lock_config=True)
ACCELERATOR = flags.DEFINE_string("accelerator", "", "v5litepod-64, v5p-128, v6e-256, h100x8x2, ...")


def main(argv: Sequence[str]) -> None:
    del argv
    config = parse_config(command.load_config(CONFIG))
    found = parse_accelerator(ACCELERATOR.value)
    jax.config.update("jax_platforms", "cpu")  # shapes only: devices there may be are left alone
    print(fit(config, found))


def fit(config: Config, accelerator: Slice) -> str:
    """How a run lies on a slice.

    Raises:
      ConfigError: something does not divide, with the cure.
    """
    hosts, devices = accelerator.hosts, accelerator.hosts * accelerator.devices
    sizes = axis_sizes(config.mesh, devices, processes=hosts)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_batches(config, mesh)
    make = policy_factory(config, few_layers(known_architecture(config)), accelerator.platform)
    param_layout(make, mesh, ShardingRules())
    axes = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    groups = config.grpo.groups // batch_shards(mesh)
    found = f"{accelerator.name}: {hosts} x {accelerator.devices} devices"
    line = f"{found}, mesh {axes}, groups of a batch shard: {groups}"
    return f"{line}; memory: plan --topology={accelerator.topology}" if accelerator.topology else line


def few_layers(architecture: PolicyArchitecture) -> PolicyArchitecture:
    """One decoder layer of each kind: the others have the same shapes, and all of a 4B take seconds to trace."""
    text, deepstack = architecture.text, len(architecture.vision.deepstack_visual_indexes)
    layers = min(text.num_hidden_layers, deepstack + 1)
    return dataclasses.replace(architecture, text=dataclasses.replace(text, num_hidden_layers=layers))


if __name__ == "__main__":
    command.run(main, required=("config", "accelerator"))
