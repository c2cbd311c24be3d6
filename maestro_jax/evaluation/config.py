"""Settings of held-out evaluations, with their defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation.

    Attributes:
      every: steps between two of them; there is one after the last step.
      tasks: how many; 0: all.
      batch: how many at a time.
      baselines: whether a run also measures the policy before reinforcement, and in the end every pair of expert and
        skill. On many devices leave it out: `maestro_jax.evaluate --baselines` needs fewer.
    """

    every: int = 20
    tasks: int = 0
    batch: int = 64
    baselines: bool = False
