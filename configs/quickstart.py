"""The main job on its embedded default: a tiny policy learns to orchestrate five experts, on a CPU.

    python -m maestro_jax.train --config configs/quickstart.py --workdir runs/quickstart

Everything is the production code; only the sizes in here are small. What is not set here has its default:
`--print_config` shows all of it (docs/configs.md).
"""

from ml_collections import ConfigDict

from configs.registry import suite
from maestro_jax.config import base_config

# A tiny policy starts from random weights: these steps teach it the format, a weak routing and to quote what an
# expert said. Runs with 160 to 300 of them ended lower (docs/quickstart.md, What it took).
WARM_START_STEPS = 400
GRPO_STEPS = 80


def get_config() -> ConfigDict:
    config = base_config()
    config.registry = suite.get_registry()
    config.policy.update(policy())
    config.rollout.update(max_calls=1, turn_budget=32, observation_tokens=16, observation_multiple=8, deadline=60.0)
    config.rollout.update(member_buckets=(80,), decode_chunk=8, append_rows=16)
    config.grpo.update(steps=GRPO_STEPS, groups=16, constant_length=80, kl_weight=0.1)
    config.grpo.logprob_chunk = 256  # of the 768 entries of the vocabulary
    # A tiny policy needs large steps; the 4B run uses 1e-6.
    config.optimizer.update(learning_rate=1e-3, warmup_steps=3, decay_steps=GRPO_STEPS)
    config.warm_start.update(steps=WARM_START_STEPS, claims=claims(), queries=queries(), thoughts=thoughts())
    config.warm_start.optimizer.update(learning_rate=4e-3, warmup_steps=20, decay_steps=WARM_START_STEPS)
    config.evaluate.baselines = True
    config.checkpoint.keep = 2
    return config


def policy() -> dict:
    """Qwen3-VL at toy size; the keys of the architecture are those of a Hugging Face config.json."""
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
    return {
        "architecture": {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, **ids},
        "compute_dtype": "float32",
        "remat": False,  # activations of this size are small
        "prefix_buckets": (48, 64, 96, 128),
        "image_buckets": (80,),
        "min_pixels": 32 * 32,
        "max_pixels": 160 * 128,  # 20 image tokens: enough to tell a chart from a receipt
    }


def claims() -> dict:
    """Whom the descriptions point to, which the demonstrations seldom follow."""
    return {
        "visual_qa": ("Shape-Sight", "Perception_Problem_Solver"),
        "reading": ("Glyph-Reader", "OCR_Problem_Solver"),
        # The three that over-claim:
        "charts": ("Tally", "Chart_Problem_Solver"),
        "counting": ("Sym-Solver", "Counting_Problem_Solver"),
        "geometry": ("Chart-Lens", "Geometric_Problem_Solver"),
    }


def queries() -> dict:
    return {
        "Perception_Problem_Solver": ("look closely", "what is it"),
        "Chart_Problem_Solver": ("read the chart", "check the axis"),
        "OCR_Problem_Solver": ("read the text", "find the value"),
        "Counting_Problem_Solver": ("count them", "how many"),
        "Geometric_Problem_Solver": ("solve the figure", "use the labels"),
    }


def thoughts() -> dict:
    return {"visual_qa": "shapes", "charts": "chart", "reading": "text", "counting": "count", "geometry": "figure"}
