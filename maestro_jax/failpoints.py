"""Places in a run at which a test can have it killed, stopped or spoiled: `MAESTRO_FAILPOINT=after_rollout:3:KILL`.

NAME:COUNT:ACTION does ACTION when this process reaches the place for the COUNTth time; several stand with commas
between them. It counts anew in every process, so a run that goes on under the same variable gets COUNT - 1 passes
further each time. Unset, a place costs one comparison (docs/reliability.md).
"""

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from maestro_jax.errors import ConfigError

VARIABLE = "MAESTRO_FAILPOINT"

# Every place, and where it is.
NAMES: Mapping[str, str] = {
    "in_warm_start": "after a step of the warm start",
    "in_baselines": "calls of the demonstrations or of the baselines are under way",
    "after_pull": "a batch of tasks was taken from the data, and nothing was done with it",
    "before_update": "a step of reinforcement begins; NAN has its loss be none",
    "in_rollout": "a round of a training rollout in which calls are under way",
    "after_rollout": "all groups of a step are over and scored, the update is not made",
    "after_update": "the parameters are new, and nothing was written",
    "in_evaluation": "a batch of held-out tasks was evaluated, before reinforcement or during it",
    "after_metrics": "the step's line of metrics.jsonl was written",
    "in_truncate": "files are about to lose the lines behind the checkpoint that the run goes on from",
    "before_save": "a checkpoint is due",
    "in_commit": "all files of a checkpoint are written, and it is not committed",
    "after_save": "a save was started; it may be committed or not",
}


class FailPointError(Exception):
    """What RAISE raises."""


def _raise(place: str) -> None:
    raise FailPointError(f"{VARIABLE} has a run fail at {place}")


ACTIONS: Mapping[str, Callable[[str], None]] = {
    "KILL": lambda place: os.kill(os.getpid(), signal.SIGKILL),
    "TERM": lambda place: os.kill(os.getpid(), signal.SIGTERM),
    "INT": lambda place: os.kill(os.getpid(), signal.SIGINT),
    "RAISE": _raise,
    "NAN": lambda place: None,  # done by who reached the place
}
SPOILED = "before_update"  # where NAN is done


@dataclass
class _Armed:
    place: str
    left: int  # times that the place is to be reached
    action: str


_armed: list[_Armed] = []


def arm(setting: str) -> None:
    """Takes the value of the variable; an empty one disarms.

    Raises:
      ConfigError: it is not NAME:COUNT:ACTION, or several with commas between them.
    """
    global _armed
    _armed = [_parsed(each) for each in setting.split(",")] if setting else []


def reach(place: str) -> bool:
    """Does what was asked for at this place; whether numbers are to be spoiled here."""
    spoils = False
    for armed in _armed:
        if armed.place == place:
            armed.left -= 1
            if armed.left == 0:
                ACTIONS[armed.action](place)
                spoils |= armed.action == "NAN"
    return spoils


def _parsed(setting: str) -> _Armed:
    place, count, action = [*setting.split(":"), "", ""][:3]
    wrong = f"{VARIABLE}={setting}"
    if setting.count(":") != 2 or not count.isdecimal() or int(count) < 1:
        raise ConfigError(
            f"{wrong} is not NAME:COUNT:ACTION with a COUNT of 1 or more; say {VARIABLE}=after_update:3:KILL"
        )
    if place not in NAMES:
        raise ConfigError(f"{wrong}: there is no place {place!r}; use one of {', '.join(NAMES)}")
    if action not in ACTIONS:
        raise ConfigError(f"{wrong}: there is no action {action!r}; use one of {', '.join(ACTIONS)}")
    if action == "NAN" and place != SPOILED:
        raise ConfigError(f"{wrong}: nothing is spoiled at {place}; use {SPOILED}:{count}:NAN")
    return _Armed(place, int(count), action)
