"""The registry read: a plain mapping from a config file in, typed dataclasses out.

Every mistake is one line that names the entry and the cure: unknown keys, wrong types, settings that an entry lacks or
that are not for its kind.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.checks import problems
from maestro_jax.registry.description.config import (
    OWN_FIELDS,
    RENAMED_FIELDS,
    ExpertConfig,
    LimitsConfig,
    RegistryConfig,
    ServiceConfig,
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

T = TypeVar("T")


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
    raw = _mapping(raw, "registry")
    _check_keys(raw, [f.name for f in dataclasses.fields(RegistryConfig)], "registry")
    entries: dict[str, Any] = {
        "experts": tuple(_read_expert(e, w) for e, w in _entries(raw, "experts")),
        "services": tuple(_read(ServiceConfig, s, w) for s, w in _entries(raw, "services")),
        "skills": tuple(_read_skill(s, w) for s, w in _entries(raw, "skills")),
        "limits": _read_limits(raw.get("limits", {})),
    }
    config = _read(RegistryConfig, raw | entries, "registry")
    if not config.endpoints_from:
        return config
    return dataclasses.replace(config, experts=reached(config.experts, Path(config.endpoints_from)))


def _mapping(raw: Any, where: str) -> dict[str, Any]:
    """A plain dict; ml_collections' ConfigDict is no `Mapping`, so the methods count, not the type."""
    if not hasattr(raw, "keys") or not hasattr(raw, "items"):
        raise ConfigError(f"{where} must be a mapping of settings, found {type(raw).__name__}")
    return {key: _mapping(value, where) if hasattr(value, "keys") else value for key, value in raw.items()}


def _entries(raw: Mapping[str, Any], key: str) -> list[tuple[Any, str]]:
    found = raw.get(key, ())
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise ConfigError(f"registry.{key} must be a tuple of mappings, found {type(found).__name__}")
    return [(entry, f"registry.{key}[{_index(entry, i)}]") for i, entry in enumerate(found)]


def _index(entry: Any, i: int) -> str:
    """The name of an entry, as people look for it; its number if it has none."""
    name = entry.get("name") if hasattr(entry, "keys") else None
    return f'"{name}"' if name and isinstance(name, str) else str(i)


def _read(cls: type[T], raw: Any, where: str) -> T:
    """Builds the dataclass `cls` from a mapping, with its keys and types checked."""
    values = _mapping(raw, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _check_keys(values, list(fields), where)
    required = dataclasses.MISSING
    for name, field in fields.items():
        if name not in values and field.default is required and field.default_factory is required:
            raise ConfigError(f'{where} lacks "{name}"; add it')
    return cls(**{name: _typed(value, fields[name].type, f"{where}.{name}") for name, value in values.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str and isinstance(value, str) or kind is bool and isinstance(value, bool):
        return value
    if kind is int and number and isinstance(value, int):
        return value
    if kind is float and number and math.isfinite(value) and value >= 0:
        return float(value)
    if kind == tuple[str, ...] and isinstance(value, tuple | list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(value, tuple) and get_origin(kind) is tuple and kind != tuple[str, ...]:
        return value  # stages, or a registry's entries: read before
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else _read(kind, value, where)
    if kind == Mapping[str, str] and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return value
    if kind == Mapping[str, Any] and isinstance(value, dict):
        return value
    word = {str: "a text", bool: "True or False", int: "an integer", float: "a number of at least 0"}.get(
        kind, "a mapping (of texts)" if get_origin(kind) is not tuple else "a tuple of texts"
    )
    cure = '; a tuple of one needs a comma: ("...",)' if word == "a tuple of texts" and isinstance(value, str) else ""
    raise ConfigError(f"{where} must be {word}, found {value!r:.60}{cure}")


def _read_limits(raw: Any) -> LimitsConfig:
    limits = _read(LimitsConfig, raw, "registry.limits")
    for key in ("calls", "tokens"):
        if getattr(limits, key) < 0:
            raise ConfigError(f"registry.limits.{key} must be at least 0 (no limit), found {getattr(limits, key)}")
    return limits


def _read_expert(raw: Any, where: str) -> ExpertConfig:
    values = _mapping(raw, where)
    expert = _read(ExpertConfig, values, where)
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
    values = _mapping(raw, where)
    stages = values.get("stages", ())
    if not isinstance(stages, tuple | list):
        raise ConfigError(f"{where}.stages must be a tuple of mappings, found {type(stages).__name__}")
    values["stages"] = tuple(_read_stage(stage, f"{where}.stages[{i}]") for i, stage in enumerate(stages))
    values.setdefault("shown", values.get("tier", 1) == 1)
    return _read(SkillConfig, values, where)


def _read_stage(raw: Any, where: str) -> Stage:
    values = _mapping(raw, where)
    kind = values.pop("kind", None)
    if kind not in STAGES:
        valid = ", ".join(f'"{name}"' for name in STAGES)
        raise ConfigError(f"{where}.kind must be one of {valid}, found {kind!r}")
    if isinstance(values.get("images"), str):  # one name may stand alone
        values["images"] = () if values["images"] == NO_IMAGES else (values["images"],)
    return _read(STAGES[kind], values, where)


def _check_keys(raw: Mapping[str, Any], valid: list[str], where: str) -> None:
    for key in raw:
        if key not in valid:
            raise ConfigError(f'{where}: unknown key "{key}"; {nearest(key, valid)}')
