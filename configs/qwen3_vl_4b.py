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

from configs import quickstart
from configs.registry import suite

STEPS = 200
PIXELS_PER_TOKEN = 32 * 32  # patch 16, merged 2 x 2

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
    config = quickstart.get_config()
    config.policy = policy()
    config.registry = suite.get_registry()
    config.rollout = rollout()
    config.grpo.update(
        {
            "steps": STEPS,
            "groups": 64,
            "microbatches": 1,  # a group a chip on 64; on 8 devices it takes 8
            "group_size": 8,
            "constant_length": 2048,
            "kl_weight": 0.0,  # a pretrained policy needs no tie to its start
            "logprob_chunk": 2048,  # of 151,936: 34 MB of fp32 logits for one group of 8 x 512 tokens in the loss
        }
    )
    config.optimizer = quickstart.optimizer(learning_rate=1e-6, warmup_steps=5)
    config.warm_start.update({"steps": 0, "claims": {}, "queries": {}, "thoughts": {}})
    config.evaluate.update({"every": 20, "baselines": False})  # `maestro_jax.evaluate --baselines` makes them
    config.checkpoint.update({"every": 10, "keep": 3})
    return config


def policy() -> ConfigDict:
    return ConfigDict(
        {
            "init_from": "checkpoints/Qwen3-VL-4B-Instruct",
            "architecture": ARCHITECTURE,
            "tokenizer": "",
            "param_dtype": "float32",  # master weights: bf16 would round updates of 1e-6 away
            "compute_dtype": "bfloat16",
            "freeze": (),
            "remat": True,
            "attention": "auto",
            "prefix_buckets": (512, 1024, 2048, 4096),
            "image_buckets": (1024, 2048, 4096),
            "images_per_task": 1,
            "min_pixels": 64 * PIXELS_PER_TOKEN,
            "max_pixels": 1024 * PIXELS_PER_TOKEN,
        }
    )


def rollout() -> ConfigDict:
    return ConfigDict(
        {
            "max_calls": 4,
            "turn_budget": 256,
            "observation_tokens": 160,
            "observation_multiple": 1,
            "room": 0,  # computed: 2,048 for five turns and four observations, with their frames
            "member_buckets": (512, 1024),
            "lanes": 0,
            "decode_chunk": 16,
            "append_rows": 64,
            "prefill_groups": 0,
            "parked_tokens": 0,
            "parked_on_host": 0,
            "temperature": 1.0,
            "deadline": 120.0,
            "ahead": 0,
            "staleness": 0,
            "max_marked": 0.2,
            "patience": 600.0,
        }
    )
