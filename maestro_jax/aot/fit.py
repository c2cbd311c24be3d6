"""How a run lies on a slice that need not exist: arithmetic on shapes, before anything is compiled."""

import dataclasses

from jax.sharding import AbstractMesh

from maestro_jax.aot.slices import Slice
from maestro_jax.config import Config
from maestro_jax.parallel.mesh import axis_sizes, batch_shards
from maestro_jax.parallel.sharding import ShardingRules, param_layout
from maestro_jax.policy.config import PolicyArchitecture
from maestro_jax.session.policy import known_architecture, policy_factory
from maestro_jax.session.rollouts import check_batches


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
