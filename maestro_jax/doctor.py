"""Says, before a run, whether its registry is sound and its experts answer.

    python -m maestro_jax.doctor --config configs/qwen3_vl_4b.py [--seconds 10] [--static]

One line for each finding, with its cure. First what the config alone shows: unknown names, cycles, missing services,
stages that do not fit together, environment variables that are not set. Then, with the sandbox made where a skill needs
one, every expert is asked whether it is ready, also the models behind services. Exit code 0 if all is well, else 78.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from maestro_jax import command
from maestro_jax.config import parse_config
from maestro_jax.errors import ConfigError
from maestro_jax.registry.checks import problems
from maestro_jax.registry.config import RegistryConfig
from maestro_jax.registry.dispatch import Registry
from maestro_jax.registry.reading import read_registry

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file with get_config().", lock_config=True)
SECONDS = flags.DEFINE_float("seconds", 10.0, "How long each expert may take to say that it is ready.", lower_bound=0.1)
STATIC = flags.DEFINE_bool("static", False, "Look at the config only; no expert is asked.")


def main(argv: Sequence[str]) -> None:
    del argv
    raw = command.load_config(CONFIG)

    # ---- What the config shows -----------------------------------------------------------------
    registry = read_registry(raw.registry)
    found = [*problems(registry), *unset_variables(registry, os.environ)]
    print_lines(found)
    if not found:
        found = contradictions(raw)
        print_lines(found)
    told = f"{len(registry.experts)} experts, {len(registry.services)} services, {len(registry.skills)} skills"
    print(f"config: {told}, {len(found)} problems")

    # ---- Who answers ---------------------------------------------------------------------------
    if not found and not STATIC.value:
        answers = asyncio.run(ask_experts(registry, SECONDS.value))
        for name, problem in answers.items():
            print(problem or f'expert "{name}": ready')
        found = [problem for problem in answers.values() if problem]

    if found:
        raise ConfigError(f"{len(found)} problems in the registry; the lines above say what to do about each")


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(" ".join(line.split()))


def unset_variables(registry: RegistryConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """Keys that experts need and that the environment does not have."""
    for expert in registry.experts:
        if expert.key and not environment.get(expert.key):
            yield f'expert "{expert.name}": environment variable {expert.key} is not set; export it with the API key'


def contradictions(raw: Any) -> list[str]:
    """What is wrong with the rest of the run's config, or between it and the registry: the first of it."""
    try:
        parse_config(raw)
    except ConfigError as error:
        return [str(error)]
    return []


async def ask_experts(config: RegistryConfig, seconds: float) -> dict[str, str | None]:
    """Expert → what is wrong with it, None if it is ready.

    Raises:
      ConfigError: an expert, a service or the sandbox cannot be built.
    """
    registry = Registry(config)
    try:
        return await registry.check(seconds)
    finally:
        await registry.close()


if __name__ == "__main__":
    command.run(main, required=("config",))
