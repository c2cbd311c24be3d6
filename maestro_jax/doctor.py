"""Says, before a run, whether its registry is sound and its experts answer.

    python -m maestro_jax.doctor --config configs/qwen3_vl_4b.py [--seconds 60] [--static]

One line for each finding, with its cure. First what the config alone shows: unknown names, cycles, missing services,
stages that do not fit together, environment variables that are not set, `serve` commands that `experts up` would
refuse. Then everything is built, the sandbox too where a skill needs one, and every endpoint gets one real request with
the expert's own settings (`registry/trials.py`), also those of models behind services. Exit code 0 if all is well, else
78.
"""

import asyncio
import dataclasses
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
from maestro_jax.registry.serving import servers_of
from maestro_jax.registry.trials import try_experts

CONFIG = command.config_flag()
SECONDS = flags.DEFINE_float(
    "seconds", 60.0, "How long each request may take; no longer than the expert's attempt_timeout.", lower_bound=0.1
)
STATIC = flags.DEFINE_bool("static", False, "Look at the config only; no expert is asked.")


def main(argv: Sequence[str]) -> None:
    del argv
    raw, file = command.load_config(CONFIG), config_flags.get_config_filename(flags.FLAGS["config"])

    # ---- What the config shows -----------------------------------------------------------------
    registry = read_registry(raw.registry)
    found = [*problems(registry), *unset_variables(registry, os.environ), *serve_mistakes(registry)]
    print_lines(found)
    if not found:
        found = contradictions(raw)
        print_lines(found)
    told = f"{len(registry.experts)} experts, {len(registry.services)} services, {len(registry.skills)} skills"
    print(f"config: {told}, {counted(found)}")

    # ---- Who answers ---------------------------------------------------------------------------
    if not found and not STATIC.value:
        asyncio.run(build(registry))
        print_lines([f'expert "{expert.name}": ready' for expert in registry.experts if expert.implementation])
        trials = asyncio.run(try_experts(registry, SECONDS.value))
        print_lines([trial.line for trial in trials])
        found = [trial.line for trial in trials if trial.is_problem]

    if found:
        raise ConfigError(f"{counted(found)} in {file}; the lines above say what to do about each")


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(" ".join(line.split()))


def counted(problems_found: Sequence[str]) -> str:
    return f"{len(problems_found)} problem{'' if len(problems_found) == 1 else 's'}"


def unset_variables(registry: RegistryConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """Keys that experts need and that the environment does not have."""
    for expert in registry.experts:
        if expert.key and not environment.get(expert.key):
            yield f'expert "{expert.name}": environment variable {expert.key} is not set; export it with the API key'


def serve_mistakes(registry: RegistryConfig) -> list[str]:
    """What `experts up` would refuse: of each expert, and if there is nothing, between them."""
    each = [dataclasses.replace(registry, experts=(expert,)) for expert in registry.experts]
    found = []
    for part in [*each, registry]:
        try:
            servers_of(part)
        except ConfigError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def contradictions(raw: Any) -> list[str]:
    """What is wrong with the rest of the run's config, or between it and the registry: the first of it."""
    try:
        parse_config(raw)
    except ConfigError as error:
        return [str(error)]
    return []


async def build(config: RegistryConfig) -> None:
    """Raises ConfigError if an expert, a service or the sandbox cannot be built."""
    await Registry(config).close()


if __name__ == "__main__":
    command.run(main, required=("config",))
