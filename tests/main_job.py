"""The main job at a tiny size, for the tests of commands: its settings, and rows for it."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data import verl_rows

ROOT = Path(__file__).parents[1]
# The published rows are handed out in a shared folder inside the checkout or beside it.
EXAMPLES = next((path for root in (ROOT, ROOT.parent) if (path := root / "shared/data/maestro_example").is_dir()), None)
STEPS, EVERY = 8, 3  # steps in all, and between checkpoints and evaluations

TEXT, VISION = "policy.architecture.text_config", "policy.architecture.vision_config"
TINY: dict[str, Any] = {
    "data.train_per_domain": 8,
    "data.test_per_domain": 1,
    "policy.prefix_buckets": (128,),
    f"{TEXT}.hidden_size": 64,
    f"{TEXT}.intermediate_size": 128,
    f"{TEXT}.num_hidden_layers": 1,
    f"{TEXT}.num_attention_heads": 2,
    f"{TEXT}.num_key_value_heads": 2,
    f"{VISION}.depth": 1,
    f"{VISION}.hidden_size": 32,
    f"{VISION}.intermediate_size": 32,
    f"{VISION}.out_hidden_size": 64,
    f"{VISION}.deepstack_visual_indexes": (0,),
    "rollout.max_calls": 1,
    "rollout.turn_budget": 24,
    "rollout.observation_tokens": 16,
    "rollout.member_buckets": (),
    # Prices differ between pairs: with a weight, the members of nearly every group differ in reward.
    "reward.cost_weight": 1e4,
    "warm_start.steps": 40,
    "warm_start.checkpoint_every": 5,
    "warm_start.groups": 4,
    "warm_start.group_size": 2,
    "warm_start.optimizer.learning_rate": 1e-2,
    "warm_start.optimizer.warmup_steps": 5,
    "warm_start.optimizer.decay_steps": 40,
    "grpo.steps": STEPS,
    "grpo.groups": 2,
    "grpo.group_size": 4,
    "grpo.logprob_chunk": 32,
    "evaluate.batch": 5,
    "evaluate.every": EVERY,
    "checkpoint.every": EVERY,
}


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (red, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: Sequence[bytes]) -> Path:
    """A file in the published schema with one row per image."""
    return verl_rows.write_rows(path, [verl_rows.row(number, image) for number, image in enumerate(images)])


def verl(train: Path, test: Path) -> dict[str, Any]:
    return {"data.kind": "verl", "data.train_files": (str(train),), "data.test_files": (str(test),)}


def without_times(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]
