"""Which settings an evaluation of a run goes by, and what they change against the run.

The run's own, so that the policy is measured as it was trained: what a config file says of episodes, prompts and reward
does not count. It does say which tasks, graders and experts there are. `--config.KEY=VALUE` counts whatever the key.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from maestro_jax.errors import ConfigError

GIVEN = ("data", "graders", "registry", "evaluate", "mesh")  # groups that a config file decides
SHOWN = 120  # characters of a value on the terminal


class Difference(NamedTuple):
    """A setting of two values, as they are printed."""

    run: str
    here: str


def combine(
    run: Mapping[str, Any], given: Mapping[str, Any], overrides: Iterable[str], groups: Iterable[str] = GIVEN
) -> dict[str, Any]:
    """The run's settings, those of a config file as far as it decides, and overrides.

    Args:
      run: nested.
      given: nested; the config file with its overrides.
      overrides: dotted keys.
      groups: that the file has; others stay the run's.
    """
    decided = {group: given[group] for group in GIVEN if group in groups}
    used = copy.deepcopy(dict(run)) | decided
    for key in overrides:
        *path, last = key.split(".")
        if path and path[0] in decided:
            continue
        here, there = used, given
        for part in path:
            here, there = here.setdefault(part, {}), there[part]
        here[last] = there[last]
    return used


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with these values in place of theirs, by dotted keys."""
    changed = dict(settings)
    for key, value in overrides.items():
        try:
            changed = _with(changed, re.findall(r"[^.\[\]]+", key), value)
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"the override {key} names no setting ({error}); --print_config shows all") from error
    return changed


def _with(values: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested mappings and sequences with another value at a place."""
    if not path:
        return value
    first, *rest = path
    if isinstance(values, tuple | list):
        items = list(values)
        items[int(first)] = _with(items[int(first)], rest, value)
        return type(values)(items)
    if not isinstance(values, Mapping):
        raise TypeError(f"{type(values).__name__} has no {first}")
    return {**values, first: _with(values.get(first, {}), rest, value)}


def differences(
    run: Mapping[str, str], here: Mapping[str, str], is_used: Callable[[str], bool]
) -> dict[str, Difference]:
    """Settings in use that are not the run's, by their dotted keys; values as they are printed."""
    keys = (key for key in sorted(run.keys() | here.keys()) if is_used(key))
    found = {key: Difference(*(values.get(key, "(not set)") for values in (run, here))) for key in keys}
    return {key: each for key, each in found.items() if each.run != each.here}


def changed_lines(changed: Mapping[str, Difference]) -> list[str]:
    return [f"config.{key} is {short(each.here)} here; the run had {short(each.run)}" for key, each in changed.items()]


def ignored_lines(ignored: Mapping[str, Difference]) -> list[str]:
    """Of settings of a config file that do not count."""
    return [
        f"config.{key} of --config does not count ({short(each.here)}): the run had {short(each.run)}; to change it, "
        f"give --config.{key}"
        for key, each in ignored.items()
    ]


def short(value: str) -> str:
    """A printed value, cut where it is a prompt, say."""
    return value if len(value) <= SHOWN else f"{value[: SHOWN - 3]}..."
