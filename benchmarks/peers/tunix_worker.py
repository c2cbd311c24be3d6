"""google-tunix in a process of its own: the actor step of its GRPO on its own Qwen3.

Runs in the environment of `tunix.txt`; source: tunix 0.1.7, `tunix/rl/algo_core.py` (loss), `tunix/sft/peft_trainer.py`
(step), `tunix/models/qwen3/`.
"""

import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import algo_core
from tunix.rl.common import TrainExample
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

from benchmarks.peers.protocol import serve

_PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "numpy")
_PAD = 0  # no id of the batch: tunix takes every other token for a real one
_ROPE_THETA = 1_000_000  # its attention does not read that of its config


def load_model(checkpoint: str) -> qwen3.Qwen3:
    """Its Qwen3 with fp32 weights; plain attention and no rematerialisation are its defaults."""
    found = json.loads((Path(checkpoint) / "config.json").read_text())
    if found["rope_theta"] != _ROPE_THETA:
        raise ValueError(f"tunix 0.1.7 computes with rope_theta {_ROPE_THETA} whatever config.json says; write that")
    config = qwen3.ModelConfig(
        num_layers=found["num_hidden_layers"],
        vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"],
        head_dim=found["head_dim"],
        num_kv_heads=found["num_key_value_heads"],
        rope_theta=found["rope_theta"],
        norm_eps=found["rms_norm_eps"],
        use_tied_embedding=found["tie_word_embeddings"],
    )
    return qwen3_params.create_model_from_safe_tensors(checkpoint, config, dtype=jnp.float32)


class Update:
    """Its trainer's jitted step with its GRPO loss on one group."""

    def __init__(self, checkpoint: str, arrays: str, optimizer: Mapping[str, float], clip: float):
        self.example = _one_group(dict(np.load(arrays)))
        config = GRPOConfig(num_generations=len(self.example.completion_ids), beta=0.0, epsilon=clip)
        config.temperature = 1.0  # its learner sets this from the sampler's
        adamw = optax.adamw(
            optimizer["learning_rate"],
            b1=optimizer["b1"],
            b2=optimizer["b2"],
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
        )
        chain = optax.chain(optax.clip_by_global_norm(optimizer["clip_norm"]), adamw)
        trainer = Trainer(load_model(checkpoint), chain, TrainingConfig(eval_every_n_steps=1), dict)

        def loss(model: qwen3.Qwen3, train_example: TrainExample, algo_config: GRPOConfig) -> Any:
            return algo_core.grpo_loss_fn(model, train_example, algo_config, pad_id=_PAD, eos_id=_PAD)

        trainer.with_loss_fn(loss, has_aux=True)
        trainer.with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": config})
        self._step, _ = trainer.jit_train_and_eval_step()

    def step(self) -> dict[str, float]:
        """One update; loss and gradient norm are those before it."""
        start = time.perf_counter()
        loss, _, norm = jax.block_until_ready(self._step(self.example))
        return {"seconds": time.perf_counter() - start, "loss": float(loss), "grad_norm": float(norm)}


def _one_group(arrays: Mapping[str, np.ndarray]) -> TrainExample:
    """The prompt stands in every row."""
    completions = arrays["completion_ids"]
    return TrainExample(
        prompt_ids=jnp.tile(arrays["prompt_ids"], (len(completions), 1)),
        prompt_mask=jnp.ones((len(completions), len(arrays["prompt_ids"])), jnp.int32),
        completion_ids=jnp.asarray(completions),
        completion_mask=jnp.asarray(arrays["loss_mask"], jnp.int32),
        advantages=jnp.asarray(arrays["advantages"]),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(arrays["old_logprobs"]),
    )


class Peer:
    """What this process answers to."""

    update: Update

    def prepare(self, **arguments: Any) -> dict[str, Any]:
        """Makes the update that `step` runs."""
        self.update = Update(**arguments)
        # XLA's pool has a thread for every core.
        return {
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "threads": len(os.sched_getaffinity(0)),
        }

    def step(self) -> dict[str, float]:
        return self.update.step()


if __name__ == "__main__":
    serve(Peer())
