"""What a warm start learns from: written episodes, as token ids of which some are a policy's own."""

import dataclasses

from maestro_jax.types import Task


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One written episode: token ids and which of them a policy would have authored."""

    task: Task
    ids: tuple[int, ...]
    authored: tuple[bool, ...]
