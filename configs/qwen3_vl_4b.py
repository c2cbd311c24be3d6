"""GRPO of Qwen3-VL-4B-Instruct as the orchestrator: the method's group size, rate and losses (docs/method.md).

    python -m maestro_jax.train --config configs/qwen3_vl_4b.py --workdir runs/4b \\
        --config.policy.init_from=path/to/Qwen3-VL-4B-Instruct \\
        --config.data.kind=verl --config.data.train_files="('train.parquet',)" \\
        --config.data.test_files="('val.parquet',)"

Architecture, weights and tokenizer come from the checkpoint directory. Without `data.*` it trains on the
embedded suite. Registry: the suite's in-process experts until yours are listed in `configs/registry/`.

Written for 64 chips, one group on each: `python -m maestro_jax.plan` says what it needs of which devices. On 8 set
`--config.grpo.microbatches=8`. Compiled for TPUs ahead of time, not yet run at this size.
"""

from ml_collections import ConfigDict

from configs.registry import suite
from maestro_jax.config import base_config

# The config.json of Qwen3-VL-4B-Instruct. A run reads that of its checkpoint; `maestro_jax.plan` needs no checkpoint.
ARCHITECTURE = {
    "text_config": {
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": (24, 20, 20)},
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2560,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (5, 11, 17),
    },
    "tie_word_embeddings": True,
    "image_token_id": 151_655,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}


def get_config() -> ConfigDict:
    config = base_config()  # whose defaults are this run's, but for these
    config.registry = suite.get_registry()
    config.policy.init_from = "checkpoints/Qwen3-VL-4B-Instruct"
    config.policy.architecture = ARCHITECTURE
    # It samples in bf16 with one kernel (cascade) and trains with another (blocks, splash): tokens differ by rounding.
    config.grpo.importance_cap = 2.0
    return config
