"""How every command starts and ends: flags in, one-line errors and exit codes out.

Exit codes: 0 done, 75 told to stop by SIGTERM or SIGINT, or experts are out (start the same command again), 78
something the user has to change (do not restart), 70 a fault of ours or numbers that are not finite, 69 another process
of the run never came or is gone (restart all); where JAX is the first to notice that, it ends the process with SIGABRT
(134).
"""

import atexit
import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from maestro_jax import failpoints
from maestro_jax.errors import (
    EXIT_CONFIG,
    EXIT_INTERNAL,
    EXIT_LOST,
    EXIT_PREEMPTED,
    ConfigError,
    NonFiniteError,
    UserError,
)
from maestro_jax.parallel import preemption
from maestro_jax.settings import flatten, read_config

flags.disclaim_key_flags()  # --config is a flag of the command that asks for it
EXIT_SECONDS = 2.0  # for what libraries and we do at the exit
TOGETHER_SECONDS = 10.0  # for all processes of a run that stop together


def run(
    main: Callable[[Sequence[str]], Any],
    required: Sequence[str],
    arguments: int = 0,
    own_config: Callable[[], str] | None = None,
) -> None:
    """Parses flags and runs `main`; a `UserError` is printed as one line.

    Args:
      required: flags that must be given.
      arguments: most words that are no flags; `main` says which.
      own_config: where --config is missing, says by the other flags which file to take; "" takes none.
    """
    tune_collector()
    preemption.listen()
    try:
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
        app.run(main, flags_parser=lambda argv: _parse(argv, required, arguments, own_config))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        _leave(EXIT_CONFIG, together=error.agreed)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(EXIT_INTERNAL, together=True)
    except preemption.Preempted as stop:
        saved = f": {stop.saved}" if stop.saved else ""
        why = stop.reason or f"by {preemption.heard()}"
        print(f"stopped{':' if stop.reason else ''} {why}{saved}; the same command goes on", file=sys.stderr)
        _leave(EXIT_PREEMPTED, together=stop.agreed)
    except Exception as error:
        traceback.print_exc()
        _leave(EXIT_INTERNAL, error)


def _leave(code: int, error: Exception | None = None, together: bool = False) -> NoReturn:
    """Ends a command early, and soon; one of several processes waits for the others only where they stop as well."""
    seconds = EXIT_SECONDS
    if "jax" in sys.modules:  # else there are no others
        from maestro_jax.parallel import cluster

        if cluster.several() and together:
            seconds = TOGETHER_SECONDS
        elif cluster.several():
            cluster.leave(EXIT_LOST if error is not None and cluster.is_loss(error) else code)

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="exit", daemon=True).start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: the interpreter would wait for threads that hang, and libraries whose threads still run abort as
    # they are taken down, which gives another code.
    os._exit(code)


def tune_collector() -> None:
    """Looks for reference cycles less often, and never among what imports have made.

    Hundreds of calls under way make thousands of objects that live for a moment. With Python's defaults the collector
    goes through them, and now and then through all of JAX, for a sixth of the time of a call (docs/performance.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _parse(
    argv: Sequence[str], required: Sequence[str], arguments: int, own_config: Callable[[], str] | None
) -> list[str]:
    logging.set_verbosity(logging.WARNING)  # libraries report every file they open
    try:
        given = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        if own_config and not any(re.match(r"--?config(=|$)", flag) for flag in given):
            flags.FLAGS(argv, known_only=True)
            if path := own_config():
                sys.argv.insert(1, f"--config={path}")  # where ml_collections looks for overrides, too
                argv = sys.argv
        rest = flags.FLAGS(argv)
    except UserError:
        raise
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    except (AttributeError, KeyError) as error:  # ml_collections, on an override of a key that is not there
        raise ConfigError(_unknown_key(argv, str(error))) from error
    except (IndexError, TypeError, ValueError) as error:  # likewise, on a value that does not fit its key
        raise ConfigError(
            f"an override does not fit its setting: {error}; compare the --config.KEY=VALUE given"
        ) from error
    if "print_config" in flags.FLAGS and flags.FLAGS["print_config"].value:
        _print_config()
    if len(rest) - 1 > arguments:
        stray = rest[1 + arguments]
        raise ConfigError(f"unexpected argument {stray!r}; write --{stray} if it is meant as a flag, or leave it out")
    for name in required:
        if not flags.FLAGS[name].value:
            raise ConfigError(f"--{name} is missing; see --help, or the README for the whole command")
    return rest


def _print_config() -> NoReturn:
    """Every setting on a line of its own, in the order of their names."""
    if not flags.FLAGS["config"].value:
        raise ConfigError("--config is missing; --print_config shows the settings of a config file")
    settings = flatten(flags.FLAGS["config"].value.to_dict())
    print("\n".join(f"config.{key} = {settings[key]}" for key in sorted(settings)))
    sys.exit()


def _unknown_key(argv: Sequence[str], reason: str) -> str:
    """Names the override that ml_collections tripped over."""
    names = [argument.removeprefix("--").split("=")[0] for argument in argv[1:] if argument.startswith("--config.")]
    guilty = [name for name in names if repr(name.rsplit(".", 1)[-1]).strip("'") in reason]
    hint = f"did you mean {reason.split('Did you mean')[1].split()[0]}?" if "Did you mean" in reason else ""
    return f"unknown key {', '.join(guilty or names)}; {hint or 'its group in the config file lists the right ones'}"


class _ConfigParser(config_flags.config_flags.ConfigFileFlagParser):
    """Reads the config.json of a run, too, and adds the defaults of what a file leaves out.

    Attributes:
      groups: that the file itself has.
    """

    def __init__(self, complete: Callable[[ConfigDict], ConfigDict]):
        super().__init__("config")
        self.groups: frozenset[str] = frozenset()
        self._complete = complete

    def parse(self, path: str) -> ConfigDict:
        config = read_config(path)
        config = config if isinstance(config, ConfigDict) else ConfigDict(config)
        self.groups = frozenset(config.keys())
        return self._complete(config).lock()


def config_flag(complete: Callable[[ConfigDict], ConfigDict]) -> flags.FlagHolder:
    """Defines --config: a file with `get_config()`, or the config.json of a run. --config.KEY=VALUE changes it.

    Args:
      complete: adds what a file leaves out, in place: `maestro_jax.config.complete`.
    """
    holder = config_flags.DEFINE_config_file("config", None, "File with get_config(), or config.json of a run.")
    flags.FLAGS["config"].parser = _ConfigParser(complete)
    flags.DEFINE_bool("print_config", False, "Print all settings, defaults and --config.KEY=VALUE included, and end.")
    return holder


def given_groups() -> frozenset[str]:
    """The groups of settings that the file of --config has itself."""
    parser = flags.FLAGS["config"].parser
    return parser.groups if isinstance(parser, _ConfigParser) else frozenset()
