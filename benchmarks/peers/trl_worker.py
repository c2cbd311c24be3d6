"""TRL in a process of its own: updates of its `GRPOTrainer`, and its losses on given log-probabilities.

Runs in the environment of `trl.txt`; source: trl 1.16, `trl/trainer/grpo_trainer.py` and `trl/trainer/utils.py`.
"""

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import trl.trainer.utils as scoring
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.protocol import serve

_PACKAGES = ("trl", "torch", "transformers", "accelerate", "numpy")
_shipped_use_triton = scoring._use_triton


def make_trainer(model: torch.nn.Module, rows: int, tokens: int, **settings: Any) -> GRPOTrainer:
    """A trainer whose update is `rows` completions of at most `tokens` tokens, one group; it never generates."""
    # The trainer asks for a tokenizer with an end and a padding; ids come from elsewhere.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=rows,
        num_generations=rows,
        max_completion_length=tokens,
        temperature=1.0,
        **settings,
    )
    data = Dataset.from_dict({"prompt": [""] * rows})
    trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), config, data, None, tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # its training loop sets this
    return trainer


class Update:
    """`compute_loss`, backward pass and optimiser step on one group, as its training loop does them."""

    def __init__(
        self, checkpoint: str, arrays: str, optimizer: Mapping[str, float], clip: float, threads: int, compact: bool
    ):
        torch.set_num_threads(threads)
        # Compact scoring computes the head for completion tokens only. On CUDA it is the default; on the CPU TRL
        # scores every position, so as not to recompile where shapes matter (`trl/trainer/utils.py`).
        scoring._use_triton = (lambda device: True) if compact else _shipped_use_triton
        self.inputs = _one_group(dict(np.load(arrays)))
        rows, tokens = self.inputs["completion_ids"].shape
        self.trainer = make_trainer(
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
            rows,
            tokens,
            loss_type="grpo",
            beta=0.0,
            epsilon=clip,
            learning_rate=optimizer["learning_rate"],
            adam_beta1=optimizer["b1"],
            adam_beta2=optimizer["b2"],
            adam_epsilon=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            max_grad_norm=optimizer["clip_norm"],
        )
        self.trainer.model.train()
        self.trainer.create_optimizer()

    def step(self) -> dict[str, float]:
        """One update; loss and gradient norm are those before it."""
        trainer, start = self.trainer, time.perf_counter()
        loss = trainer.compute_loss(trainer.model, self.inputs)
        trainer.accelerator.backward(loss)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start, "loss": loss.item(), "grad_norm": norm.item()}


def _one_group(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The inputs of `compute_loss`: the prompt stands in every row, as the trainer's own sampler repeats it."""
    completions = torch.tensor(arrays["completion_ids"]).long()
    prompt = torch.tensor(arrays["prompt_ids"]).long().repeat(len(completions), 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "tool_mask": torch.tensor(arrays["loss_mask"]).long(),
        "advantages": torch.tensor(arrays["advantages"]),
        "old_per_token_logps": torch.tensor(arrays["old_logprobs"]),
    }


def _scored_tokens(update: Update) -> int:
    """For how many tokens a forward pass computes the head."""
    counted: list[int] = []
    function = scoring._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            counted.append(len(hidden))
            return function.apply(hidden, *rest)

    scoring._ChunkedLogProbFunction = Counting
    try:
        with torch.no_grad():
            update.trainer.compute_loss(update.trainer.model, update.inputs)
    finally:
        scoring._ChunkedLogProbFunction = function
    return sum(counted)


# ---- losses --------------------------------------------------------------------------------------------------


def _loss(
    given: Mapping[str, torch.Tensor], importance: bool = False, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    rows, tokens = given["logprobs"].shape
    trainer = make_trainer(_toy(), rows, tokens, **settings)
    trainer.model.train()
    trainer.use_vllm = importance  # after construction: no engine is wanted, only its correction of the loss
    logprobs = given["logprobs"].clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = _given_logprobs(logprobs, given["entropy"])
    ids = torch.zeros((rows, tokens), dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": given["mask"].long(),
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_logprobs"],
        "ref_per_token_logps": given["reference_logprobs"],
        "importance_sampling_ratio": given["importance"],
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = trainer.compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach().numpy(), gradient.numpy()


def _given_logprobs(logprobs: torch.Tensor, entropy: torch.Tensor) -> Callable[..., tuple]:
    return lambda *args, **kwargs: (logprobs, entropy, None)


def _toy() -> torch.nn.Module:
    """The smallest model that a trainer takes; its forward pass is never run."""
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = Qwen3ForCausalLM(config)
    # With a divergence the trainer loads its reference model from where the policy came from.
    model.save_pretrained(directory := tempfile.mkdtemp())
    return AutoModelForCausalLM.from_pretrained(directory)


# ---- commands ------------------------------------------------------------------------------------------------


class Peer:
    """What this process answers to."""

    update: Update

    def prepare(self, **arguments: Any) -> dict[str, Any]:
        """Makes the update that `step` runs."""
        self.update = Update(**arguments)
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        return {"versions": versions, "threads": torch.get_num_threads(), "scored_tokens": _scored_tokens(self.update)}

    def step(self) -> dict[str, float]:
        return self.update.step()

    def losses(self, arrays: str, cases: Mapping[str, Mapping[str, Any]], into: str) -> None:
        """Loss and its gradient by log-probabilities, for every case of settings; written to the file `into`.

        Args:
          arrays: file with `logprobs`, `old_logprobs`, `reference_logprobs`, `entropy`, `importance` `[rows, tokens]`,
            `mask` (0 and 1) like them, `advantages [rows]`.
          cases: by name, settings of `GRPOConfig`; "importance" (bool) switches on the weights that it applies to
            tokens of vLLM.
        """
        given = {name: torch.tensor(array) for name, array in np.load(arrays).items()}
        results: dict[str, np.ndarray] = {}
        for name, settings in cases.items():
            results[f"{name}/loss"], results[f"{name}/gradient"] = _loss(given, **settings)
        np.savez(into, **results)  # type: ignore[arg-type]  # numpy's stub takes every keyword for its allow_pickle


if __name__ == "__main__":
    serve(Peer())
