"""How every command starts and ends: flags in, one-line errors and exit codes out.

Exit codes: 0 done, 78 something the user has to change (do not restart), 70 a fault of ours.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from maestro_jax.errors import EXIT_CONFIG, EXIT_INTERNAL, ConfigError, UserError


def run(main: Callable[[Sequence[str]], Any], required: Sequence[str]) -> None:
    """Parses flags and runs `main`; a `UserError` is printed as one line."""
    try:
        app.run(main, flags_parser=lambda argv: _parse(argv, required))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_INTERNAL)


def _parse(argv: Sequence[str], required: Sequence[str]) -> list[str]:
    logging.set_verbosity(logging.WARNING)  # libraries report every file they open
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    except (AttributeError, KeyError) as error:  # ml_collections, on an override of a key that is not there
        raise ConfigError(_unknown_key(argv, str(error))) from error
    for name in required:
        if not flags.FLAGS[name].value:
            raise ConfigError(f"--{name} is missing; see --help, or the README for the whole command")
    return rest


def _unknown_key(argv: Sequence[str], reason: str) -> str:
    """Names the override that ml_collections tripped over."""
    names = [argument.removeprefix("--").split("=")[0] for argument in argv[1:] if argument.startswith("--config.")]
    guilty = [name for name in names if repr(name.rsplit(".", 1)[-1]).strip("'") in reason]
    hint = f"did you mean {reason.split('Did you mean')[1].split()[0]}?" if "Did you mean" in reason else ""
    return f"unknown key {', '.join(guilty or names)}; {hint or 'its group in the config file lists the right ones'}"


def load_config(flag: flags.FlagHolder) -> Any:
    """The `ConfigDict` of a config-file flag.

    Raises:
      ConfigError: the file is missing or fails to run.
    """
    try:
        config = flag.value
        config.to_dict()
        return config
    except OSError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"cannot load the config file: {lines[-1] if lines else error}; check --config") from error
