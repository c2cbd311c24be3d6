"""Whose a directory is: the settings that it was begun with, and what may change when a command goes on there."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from maestro_jax.config import base_config, completed
from maestro_jax.errors import ConfigError
from maestro_jax.registry.record.journal import CallLine, RequestLine, journals, read_lines
from maestro_jax.settings import Settings, flatten, read_settings
from maestro_jax.types import Status

SHOWN = 120  # characters of a value in an error
# Settings of experts and services that say how they are reached, not what they answer: these may change, too, and it
# is told. Not prices: they enter the reward.
REACHED_BY = (
    "endpoints",
    "key",
    "key_hosts",
    "concurrency",
    "attempt_timeout",
    "timeout",
    "serve",
    "workers",
    "processes",
)


def check_same_run(path: Path, mine: Settings, is_free: Callable[[str], bool]) -> list[str]:
    """Refuses to go on in a work directory that holds a run with other settings.

    Args:
      path: the run's config.json; without it, all is well.
      is_free: which keys may differ.

    Returns:
      A line for each expert and service that is reached in another way than before.
    """
    changes: list[str] = []
    earlier = read_settings(path) or mine
    theirs, own = dataclasses.replace(earlier, config=completed(earlier.config)).flat, mine.flat
    for key in sorted(own.keys() | theirs.keys()):
        before, now = (settings.get(key, "(not set)") for settings in (theirs, own))
        if before == now or is_free(key):
            continue
        if _only_reaches(key):
            changes.append(f"config.{key} was {before} so far and is now {now}")
            continue
        name = key if key.startswith("--") else f"config.{key}"  # a flag of the command, or a setting
        if max(len(before), len(now)) > SHOWN:  # a prompt: only where they part is of use
            same = len(os.path.commonprefix((before, now)))
            before, now = (f"...{value[max(same - 20, 0) : same + SHOWN - 20]}..." for value in (before, now))
        raise ConfigError(
            f"{path.parent} holds a run with {name}={before}, this one has {now}; "
            f"use another directory, or the same setting to go on"
        )
    return changes


def holds_calls(workdir: Path) -> bool:
    """Whether experts have answered a run there: that is paid for, and later starts are answered from the journal."""
    found = (line for path in journals(str(workdir / "journal.jsonl")) for line in read_lines(str(path)))
    return any(isinstance(line, CallLine | RequestLine) and line.status == Status.OK.name for line in found)


def settings_hashes(settings: Mapping[str, str]) -> dict[str, str]:
    """What a checkpoint knows of its run: hashes of all settings, and of the registry's, without how it is reached.

    Defaults do not enter, so that a version of maestro_jax with more settings goes on with it.
    """
    defaults = flatten(base_config().to_dict())
    kept = {k: value for k, value in settings.items() if k != "checkpoint.directory" and not _only_reaches(k)}
    kept = {k: value for k, value in kept.items() if value != defaults.get(k)}
    registry = {key: value for key, value in kept.items() if key.startswith("registry.")}
    return {name: _hash(values) for name, values in (("config", kept), ("registry", registry))}


def check_same_settings(saved: Mapping[str, str], mine: Mapping[str, str], where: str) -> None:
    """Refuses a checkpoint of a run with other settings; both as `settings_hashes` makes them.

    Raises:
      ConfigError: they differ.
    """
    if saved != mine:
        part = "registry" if saved.get("registry") != mine["registry"] else "config"
        raise ConfigError(
            f"the checkpoint in {where} belongs to a run with another {part}; go on with that run's settings, or use "
            "another config.checkpoint.directory"
        )


def _only_reaches(key: str) -> bool:
    return key.startswith(("registry.experts.", "registry.services.")) and key.rsplit(".", 1)[-1] in REACHED_BY


def _hash(settings: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
