"""The policy of a session: its architecture, how it is made for devices, its parameters in their shards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.config import Config
from maestro_jax.errors import ConfigError
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.update import UpdateConfig
from maestro_jax.parallel.sharding import ShardingRules, init_params, param_layout
from maestro_jax.policy.attention.interface import suited_to
from maestro_jax.policy.config import PolicyArchitecture, architecture_from_hf, open_architecture
from maestro_jax.policy.huggingface import import_params
from maestro_jax.policy.model import Policy

T = TypeVar("T")


def fields(cls: type[T], section: Any) -> T:
    """The part of a config section that a room's own settings need."""
    return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def update_config(config: Config, temperature: float) -> UpdateConfig:
    return UpdateConfig(fields(LossConfig, config.grpo), temperature, config.grpo.logprob_chunk, config.policy.freeze)


def policy_factory(config: Config, architecture: PolicyArchitecture, platform: str) -> Callable[[], Policy]:
    """What makes the policy, for devices of a platform ("cpu", "gpu", "tpu")."""
    policy = config.policy
    attention = suited_to(platform)
    if policy.attention != "auto":
        attention = dataclasses.replace(attention, backend=policy.attention)
    if attention.backend == "splash" and platform != "tpu":
        raise ConfigError(f'config.policy.attention="splash" needs a TPU, found {platform}; use "auto"')
    dtypes = jnp.dtype(policy.param_dtype), jnp.dtype(policy.compute_dtype)
    return lambda: Policy(
        architecture, nnx.Rngs(config.seed), *dtypes, policy.remat, attention, policy.matmul_precision
    )


def known_architecture(config: Config) -> PolicyArchitecture:
    """Of the checkpoint to start from; where that is not at hand, of the config."""
    policy = config.policy
    if policy.architecture and not Path(policy.init_from).is_dir():
        return architecture_from_hf(policy.architecture, "config.policy.architecture")
    return open_architecture(policy.architecture, policy.init_from)


def open_params(config: Config, architecture: PolicyArchitecture, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """Parameters in their shards: those of the checkpoint to start from, or random ones."""
    make = policy_factory(config, architecture, mesh.devices.flat[0].platform)
    if not config.policy.init_from:
        return init_params(make, mesh, ShardingRules())
    graph, abstract, shardings = param_layout(make, mesh, ShardingRules())
    return graph, import_params(config.policy.init_from, abstract, shardings, architecture.vision.patch_shape)
