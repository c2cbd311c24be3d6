"""Settings of the warm start, with their defaults."""

import dataclasses
from typing import Any

from maestro_jax.grpo.config import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised fine-tuning on one's own demonstrations, or on those of a weak router (`suite/demonstrations.py`).

    Attributes:
      steps: updates; 0 leaves the warm start out.
      checkpoint_every: steps between its checkpoints.
      groups: of a batch; one of one's own demonstrations is a group by itself.
      group_size: demonstrations of a group, those of the router.
      demonstrations: JSONL files of one's own (`warm_start/demonstrations.py`), in the place of the router's.
      image_root: folder that image paths in these files start from; empty allows inline images only.

    What the router does:
      claims: source → (expert, skill) that the registry's descriptions point to, right or wrong.
      follow_expert, follow_skill: how often the router follows the description of each; else at random.
      second_call: how often it asks another pair after a reply that gives nothing.
      rehearsal: share of demonstrations whose reply is a random text, to learn quoting from.
      queries: skill → phrases the router writes as query.
      thoughts: source → what the router thinks before its first call: what kind of task it sees.
    """

    steps: int = 0
    checkpoint_every: int = 100
    groups: int = 8
    group_size: int = 4
    demonstrations: tuple[str, ...] = ()
    image_root: str = ""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, warmup_steps=20)
    # Of the router that writes the demonstrations of a tiny policy; nothing else reads them.
    claims: dict[str, Any] = dataclasses.field(default_factory=dict)
    follow_expert: float = 0.45
    follow_skill: float = 0.6
    second_call: float = 0.3
    rehearsal: float = 0.75
    queries: dict[str, Any] = dataclasses.field(default_factory=dict)
    thoughts: dict[str, Any] = dataclasses.field(default_factory=dict)
