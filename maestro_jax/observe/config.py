"""Settings of what a run shows, with their defaults."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class TrackersConfig:
    """Who else gets the lines of metrics.jsonl (docs/trackers.md).

    Attributes:
      use: "tensorboard", "wandb", "mlflow", "trackio", or "package.module:Class" (`observe/trackers.py: Tracker`).
      project: what runs are filed under.
      run: name of this one; empty takes that of the work directory.
      directory: where trackers keep files; empty: WORKDIR/trackers.
      options: tracker → arguments of its own; a class is named without its package.
    """

    use: tuple[str, ...] = ()
    project: str = "maestro"
    run: str = ""
    directory: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
