"""Settings of checkpoints, with their defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What becomes of checkpoints (docs/checkpoints.md).

    Attributes:
      every: steps between two of them.
      keep: so many of the newest are kept; 0: all.
      keep_every: those of steps that this divides are kept for good; 0: none.
      directory: where they are, on a file system or an object store ("gs://bucket/run"); empty: WORKDIR/checkpoints.
    """

    every: int = 10
    keep: int = 3
    keep_every: int = 0
    directory: str = ""
