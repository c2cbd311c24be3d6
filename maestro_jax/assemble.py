"""From a config to the parts of a run that more than one command makes."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from maestro_jax.config import Config
from maestro_jax.errors import ConfigError
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.update import UpdateConfig
from maestro_jax.parallel.mesh import batch_shards
from maestro_jax.policy.attention import suited_to
from maestro_jax.policy.config import PolicyArchitecture
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
    return lambda: Policy(architecture, nnx.Rngs(config.seed), *dtypes, policy.remat, attention)


def check_batches(config: Config, mesh: Mesh) -> None:
    """Groups are spread over devices, so every batch of them must divide.

    Raises:
      ConfigError: one does not.
    """
    shards = batch_shards(mesh)
    batches = {"grpo.groups": config.grpo.groups, "evaluate.batch": config.evaluate.batch}
    batches["grpo.groups / microbatches"] = config.grpo.groups // config.grpo.microbatches
    if config.warm_start.steps:
        batches["warm_start.groups"] = config.warm_start.groups
    for key, size in batches.items():
        if size % shards:
            raise ConfigError(
                f"config.{key}={size} does not divide over {shards} devices (mesh axes data x fsdp); "
                f"set it to a multiple of {shards}"
            )
