"""The main job on its embedded default: a tiny policy learns to orchestrate five experts, on a CPU.

    python -m maestro_jax.train --config configs/quickstart.py --workdir runs/quickstart

Everything is the production code; only the sizes in here are small.
"""

from ml_collections import ConfigDict

from configs.registry import suite

# A tiny policy starts from random weights: these steps teach it the format, a weak routing and to quote what an
# expert said. Runs with 160 to 300 of them ended lower (docs/quickstart.md, What it took).
WARM_START_STEPS = 400
GRPO_STEPS = 80


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "data": {
                "kind": "suite",
                "suite_directory": "",
                "train_per_domain": 80,
                "test_per_domain": 50,
                "train_files": (),
                "test_files": (),
                "train_split": "train",
                "test_split": "test",
                "image_root": "",
                "mixture": (),
                "damage_limit": 0,
            },
            "policy": policy(),
            "registry": suite.get_registry(),
            "rollout": {
                "max_calls": 1,
                "turn_budget": 32,
                "observation_tokens": 16,
                "observation_multiple": 8,
                "room": 0,  # computed: what the longest episode needs
                "member_buckets": (80,),
                "lanes": 0,
                "decode_chunk": 8,
                "append_rows": 16,
                "prefill_groups": 0,
                "parked_tokens": 0,
                "parked_on_host": 0,
                "temperature": 1.0,
                "deadline": 60.0,
                "ahead": 0,
                "staleness": 0,
                "max_marked": 0.2,
                "patience": 600.0,
            },
            "reward": {"require_call": True, "cost_weight": 0.0, "latency_weight": 0.0},
            "grpo": {
                "steps": GRPO_STEPS,
                "groups": 16,
                "group_size": 8,
                "advantage": "std",
                "surrogate": "ppo",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "importance_cap": 0.0,
                "aggregation": "sequence",
                "constant_length": 80,
                "entropy_weight": 0.0,
                "kl_weight": 0.1,
                "kl_estimator": "k3",
                "logprob_chunk": 256,  # of the 768 entries of the vocabulary
                "microbatches": 1,
                "stream": False,
            },
            # A tiny policy needs large steps; the 4B run uses 1e-6.
            "optimizer": optimizer(learning_rate=1e-3, warmup_steps=3, decay_steps=GRPO_STEPS),
            "warm_start": warm_start(),
            "evaluate": {"every": 20, "tasks": 0, "batch": 64, "baselines": True},
            "checkpoint": {"every": 10, "keep": 2, "keep_every": 0, "directory": ""},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )


def policy() -> ConfigDict:
    """Qwen3-VL at toy size; the keys are those of a Hugging Face config.json."""
    text = {
        "vocab_size": 768,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        # An episode has about 350 tokens, prompt included: a small base leaves no frequency idle.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": (12, 10, 10)},
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": (0, 1),
    }
    # Ids of the special tokens in the tokenizer that the run trains (policy/tokens.py).
    ids = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5}
    return ConfigDict(
        {
            "init_from": "",
            "architecture": {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, **ids},
            "tokenizer": "",
            "param_dtype": "float32",
            "compute_dtype": "float32",
            "freeze": (),
            "remat": False,  # activations of this size are small
            "attention": "auto",
            "prefix_buckets": (48, 64, 96, 128),
            "image_buckets": (80,),
            "images_per_task": 1,
            "min_pixels": 32 * 32,
            "max_pixels": 160 * 128,  # 20 image tokens: enough to tell a chart from a receipt
        }
    )


def optimizer(learning_rate: float, warmup_steps: int, decay_steps: int = 0) -> ConfigDict:
    return ConfigDict(
        {
            "learning_rate": learning_rate,
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "moments": "float32",
            "offload": False,
        }
    )


def warm_start() -> ConfigDict:
    """What the descriptions claim, and how seldom the demonstrations follow them."""
    return ConfigDict(
        {
            "steps": WARM_START_STEPS,
            "checkpoint_every": 100,
            "groups": 8,
            "group_size": 4,
            "claims": {
                "visual_qa": ("Shape-Sight", "Perception_Problem_Solver"),
                "reading": ("Glyph-Reader", "OCR_Problem_Solver"),
                # The three that over-claim:
                "charts": ("Tally", "Chart_Problem_Solver"),
                "counting": ("Sym-Solver", "Counting_Problem_Solver"),
                "geometry": ("Chart-Lens", "Geometric_Problem_Solver"),
            },
            "follow_expert": 0.45,
            "follow_skill": 0.6,
            "second_call": 0.3,
            "rehearsal": 0.75,
            "queries": {
                "Perception_Problem_Solver": ("look closely", "what is it"),
                "Chart_Problem_Solver": ("read the chart", "check the axis"),
                "OCR_Problem_Solver": ("read the text", "find the value"),
                "Counting_Problem_Solver": ("count them", "how many"),
                "Geometric_Problem_Solver": ("solve the figure", "use the labels"),
            },
            "thoughts": {
                "visual_qa": "shapes",
                "charts": "chart",
                "reading": "text",
                "counting": "count",
                "geometry": "figure",
            },
            "optimizer": optimizer(learning_rate=4e-3, warmup_steps=20, decay_steps=WARM_START_STEPS),
        }
    )
