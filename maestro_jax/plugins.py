"""What users bring along: classes and functions that a config names as "package.module:name".

A config names them, data never does: a row of a file picks among the names of a config. They are imported when the
config is checked, so that a wrong name is found before anything is computed.
"""

import importlib
from typing import Any

from maestro_jax.errors import ConfigError


def load(path: str, where: str) -> Any:
    """What "package.module:name" names.

    Args:
      where: opens the error: what names it, such as 'expert "Tally": implementation'.

    Raises:
      ConfigError: it does not import, or cannot be called.
    """
    module, _, attribute = path.partition(":")
    cure = 'write it as "package.module:name" and check that it is installed'
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # an import runs foreign code: anything may be raised
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        reason = one_line(error)
        if module.startswith("maestro_jax.") and missing and not missing.startswith("maestro_jax"):
            cure = f"the package {missing} is missing; install it with `pip install '.[suite]'`"
        elif "libGL" in reason:
            cure = "run `pip uninstall opencv-python`, then `pip install --force-reinstall opencv-python-headless`"
        raise ConfigError(f'{where} "{path}" does not import ({reason}); {cure}') from error
    if not callable(found):
        raise ConfigError(f'{where} "{path}" is neither a class nor a function; {cure}')
    return found


def one_line(error: BaseException) -> str:
    """What foreign code raised, for the middle of an error of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
