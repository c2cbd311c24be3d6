"""The registry read: a plain mapping from a config file in, typed dataclasses out.

Every mistake is one line that names the entry and the cure: unknown keys, wrong types, settings that an entry lacks or
that are not for its kind.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.mapping import Reader, mapping, read
from maestro_jax.registry.description.checks import problems
from maestro_jax.registry.description.config import (
    OWN_FIELDS,
    RENAMED_FIELDS,
    ExpertConfig,
    LimitsConfig,
    RegistryConfig,
    SkillConfig,
)
from maestro_jax.registry.description.hosts import check_key_hosts, check_url
from maestro_jax.registry.description.names import nearest
from maestro_jax.registry.description.published import reached
from maestro_jax.registry.description.stages import NO_IMAGES, STAGES, Stage

# Settings that only one kind of expert has.
_OF_CLASSES = ("latency_mean", "latency_seed", "timeout", "workers", "processes")
_OF_SERVERS = (
    "model",
    "key",
    "key_hosts",
    "temperature",
    "max_tokens",
    "top_p",
    "rename",
    "concurrency",
    "attempt_timeout",
    "serve",
)


def parse_registry(raw: Any) -> RegistryConfig:
    """Reads a registry (see `read_registry`) and checks it.

    Raises:
      ConfigError: one line that names the entry, what is wrong and the cure.
    """
    config = read_registry(raw)
    for problem in problems(config):
        raise ConfigError(problem)
    return config


def read_registry(raw: Any) -> RegistryConfig:
    """A mapping with `experts`, `services` and `skills` (tuples of mappings) and the rest, keys and types checked.

    Args:
      raw: a dict or anything with the methods of one, such as an ml_collections ConfigDict.

    Raises:
      ConfigError: one line that names the entry, what is wrong and the cure.
    """
    config = read(RegistryConfig, raw, "registry", _READERS)
    if not config.endpoints_from:
        return config
    return dataclasses.replace(config, experts=reached(config.experts, Path(config.endpoints_from)))


def _amount(value: Any, where: str) -> float:
    """No number of a registry is below 0 or without end."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    raise ConfigError(f"{where} must be a number of at least 0, found {value!r:.60}")


def _read_limits(raw: Any, where: str) -> LimitsConfig:
    limits = read(LimitsConfig, raw, where, _READERS)
    for key in ("calls", "tokens"):
        if getattr(limits, key) < 0:
            raise ConfigError(f"{where}.{key} must be at least 0 (no limit), found {getattr(limits, key)}")
    return limits


def _read_expert(raw: Any, where: str) -> ExpertConfig:
    values = mapping(raw, where)
    expert = read(ExpertConfig, values, where, {float: _amount})
    where = f'expert "{expert.name}"'
    if bool(expert.implementation) == bool(expert.endpoints):
        raise ConfigError(
            f"{where} must have either implementation (a class of this process) or endpoints (URLs), and not both"
        )
    others, kind = (_OF_SERVERS, "endpoints") if expert.implementation else (_OF_CLASSES, "implementation")
    for key in others:
        if key in values:
            raise ConfigError(f'{where}: "{key}" is for experts with {kind}; remove it')
    if expert.endpoints:
        _check_served(expert, where)
    return expert


def _check_served(expert: ExpertConfig, where: str) -> None:
    """What an expert behind servers needs."""
    if not expert.model:
        raise ConfigError(f'{where} lacks "model"; add the name that its servers know it by')
    for url in expert.endpoints:
        check_url(url, where)
    if len(set(expert.endpoints)) < len(expert.endpoints):
        raise ConfigError(f"{where}: an endpoint is there twice; name each once")
    for key in ("max_tokens", "concurrency", "attempt_timeout", "top_p"):
        if getattr(expert, key) <= 0:
            raise ConfigError(f"{where}: {key} must be above 0")
    if expert.key and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", expert.key):
        # Not quoted: it may be the key itself.
        raise ConfigError(f"{where}: key must be the NAME of an environment variable, such as OPENAI_API_KEY")
    check_key_hosts(expert)
    for name in OWN_FIELDS:
        if name in expert.options:
            raise ConfigError(f'{where}: options must not set "{name}"; the expert\'s own settings do')
    _check_rename(expert, where)
    try:
        json.dumps(dict(expert.options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: options go into each request as JSON, and do not ({error}); correct them"
        ) from error


def _check_rename(expert: ExpertConfig, where: str) -> None:
    taken = {*OWN_FIELDS, *expert.options} - set(expert.rename)
    for field, name in expert.rename.items():
        if field not in RENAMED_FIELDS:
            raise ConfigError(f'{where}: rename has "{field}"; {nearest(field, RENAMED_FIELDS)}')
        if name in taken:
            raise ConfigError(f'{where}: rename calls {field} "{name}", and another field has that name; choose one')
        taken |= {name} - {""}


def _read_skill(raw: Any, where: str) -> SkillConfig:
    values = mapping(raw, where)
    return read(SkillConfig, {"shown": values.get("tier", 1) == 1} | values, where, _READERS)


def _read_stage(raw: Any, where: str) -> Stage:
    values = mapping(raw, where)
    kind = values.pop("kind", None)
    if kind not in STAGES:
        valid = ", ".join(f'"{name}"' for name in STAGES)
        raise ConfigError(f"{where}.kind must be one of {valid}, found {kind!r}")
    if isinstance(values.get("images"), str):  # one name may stand alone
        values["images"] = () if values["images"] == NO_IMAGES else (values["images"],)
    return read(STAGES[kind], values, where, _READERS)


_READERS: dict[Any, Reader] = {
    float: _amount,
    LimitsConfig: _read_limits,
    ExpertConfig: _read_expert,
    SkillConfig: _read_skill,
    Stage: _read_stage,
}
