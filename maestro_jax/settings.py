"""What a command was started with, as a file: all of it and exact, so that the file is a config itself.

JSON has fewer types than Python. Its arrays are tuples, as in config files; a list is {"$list": [...]}, a mapping with
keys that are no texts or begin with "$" is {"$mapping": [[key, value], ...]}. Flags of the command stand beside the
config's groups, under names that begin with "--".
"""

import dataclasses
import json
import os
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from maestro_jax.errors import ConfigError, UserError
from maestro_jax.observe.files import read_json, write_json

_LIST, _MAPPING = "$list", "$mapping"
# Where the suite's experts were when earlier versions wrote a run's config.json.
_MOVED = ("maestro_jax.registry.specialists.", "maestro_jax.suite.specialists.")
# Frames of these do not say where in a config file something happened.
_LIBRARIES = (os.path.dirname(__file__), os.path.dirname(ml_collections.__file__), runpy.__file__, "<frozen")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings as their file holds them.

    Attributes:
      config: nested, with the types that the config has.
      flags: "--name" → printed value, of flags that a result depends on.
    """

    config: dict[str, Any]
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, raw: Any, flags: Mapping[str, str] | None = None) -> "Settings":
        """Those of a `ConfigDict` (or any nested mapping), as `read` would give them back.

        Raises:
          ConfigError: a value that no file can hold.
        """
        return cls(_from_json(json.loads(json.dumps(_to_json(raw, "config")))), flags or {})

    def write(self, path: Path) -> None:
        """Raises UserError where the file cannot be written."""
        write_json(path, {**_to_json(self.config, "config"), **self.flags}, sort=False)

    @property
    def flat(self) -> dict[str, str]:
        """Dotted keys and printed values."""
        return flatten(self.config) | dict(self.flags)


def read_settings(path: Path) -> Settings | None:
    """What `Settings.write` wrote; None where there is no file.

    Raises:
      ConfigError: a file of a version that wrote less.
      DataError: it is no JSON.
    """
    values = read_json(path)
    if values is None:
        return None
    if not isinstance(values, dict) or any("." in key for key in values if not key.startswith("--")):
        raise ConfigError(
            f"{path} is no config.json of this version, which holds all settings; take the version of maestro_jax that "
            "wrote it, or a config file of your own and another directory"
        )
    flags = {key: value for key, value in values.items() if key.startswith("--")}
    return Settings(_from_json({key: value for key, value in values.items() if key not in flags}), flags)


def read_config(config: Any) -> Any:
    """A `ConfigDict` or nested mapping as it is; of a path, the config that the file holds.

    Args:
      config: a path may be that of a file with `get_config()`, with ":ARGUMENT" behind it where that takes one, or that
        of a run's config.json.

    Raises:
      ConfigError: there is no such file, it fails to run, or it holds no config.
    """
    if not isinstance(config, str | os.PathLike):
        return config
    name, _, argument = os.fspath(config).partition(".py:")
    path = Path(f"{name}.py" if argument else name)
    if not path.is_file():
        raise ConfigError(f"cannot load the config file: there is no {path}; check --config")
    if path.suffix == ".json":
        settings = read_settings(path)
        if settings is None or "registry" not in settings.config:
            raise ConfigError(f"{path} holds no settings of a run; name the config.json in a run's directory")
        return settings.config
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is not None:
            return get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as error:  # the file may do anything
        raise ConfigError(f"the config file fails: {_place(error, path)}; correct it there") from error
    raise ConfigError(f"{path} has no get_config(); write it as the shipped configs/quickstart.py does")


def _place(error: Exception, path: Path) -> str:
    """File, line and reason of what a config file, or one that it imports, raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename} line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    where = f"{theirs[-1].filename} line {theirs[-1].lineno}" if theirs else str(path)
    return f"{where}: {type(error).__name__}: {error}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and printed values; entries of a registry by their names."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and value and all(isinstance(x, Mapping) and "name" in x for x in value):
            flat[prefix + key] = repr([entry["name"] for entry in value])
            for entry in value:  # not deeper: an option may have the name of a setting
                own = {name: repr(x) for name, x in entry.items() if name != "name"}
                flat |= {f"{prefix}{key}.{entry['name']}.{name}": x for name, x in own.items()}
        else:
            flat[prefix + key] = repr(value)
    return flat


def _to_json(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        items = [_to_json(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return items if isinstance(value, tuple) else {_LIST: items}
    if not hasattr(value, "items"):  # a ConfigDict is no Mapping
        raise ConfigError(
            f"{where} is a {type(value).__name__}, which the run's config.json cannot hold; use texts, numbers, truth "
            "values, None, tuples, lists and mappings"
        )
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    return {_MAPPING: [[_to_json(key, where), _to_json(item, f"{where}.{key}")] for key, item in value.items()]}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if isinstance(value, str):
        return value.replace(*_MOVED) if value.startswith(_MOVED[0]) else value
    if not isinstance(value, dict):
        return value
    if value.keys() == {_LIST}:
        return list(map(_from_json, value[_LIST]))
    if value.keys() == {_MAPPING}:
        return {_from_json(key): _from_json(item) for key, item in value[_MAPPING]}
    return {key: _from_json(item) for key, item in value.items()}
