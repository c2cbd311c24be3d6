"""Configs as functions take them: mappings, or files."""

import runpy
from pathlib import Path
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.settings import read_settings


def read_config(config: Any) -> Any:
    """A `ConfigDict` or nested mapping as it is; of a path, the config that the file holds.

    Args:
      config: a path may be that of a file with `get_config()`, with ":ARGUMENT" behind it where that takes one, or that
        of a run's config.json.

    Raises:
      ConfigError: there is no such file, or it holds no config.
    """
    if not isinstance(config, str | Path):
        return config
    name, _, argument = str(config).partition(".py:")
    path = Path(f"{name}.py" if argument else name)
    if not path.is_file():
        raise ConfigError(f"cannot load the config file: there is no {path}; check its path")
    if path.suffix == ".json":
        settings = read_settings(path)
        if settings is None or "registry" not in settings.config:
            raise ConfigError(f"{path} holds no settings of a run; name the config.json in a run's directory")
        return settings.config
    found = runpy.run_path(str(path)).get("get_config")
    if found is None:
        raise ConfigError(f"{path} has no get_config(); write it as the shipped configs/quickstart.py does")
    return found(argument) if argument else found()
