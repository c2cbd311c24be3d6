"""Settings of learning, with their defaults."""

import dataclasses
from typing import Literal

Surrogate = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["sequence", "token", "constant"]
Moments = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """One update per step from `groups` tasks with `group_size` members each.

    Attributes:
      advantage: "std", "none" or "leave_one_out" (`grpo/advantages.py`).
      surrogate: what is clipped, "ppo" (a token's update), "gspo" (a member's) or "cispo" (a token's weight).
      clip_low, clip_high: the ratio's range is 1 - clip_low to 1 + clip_high.
      importance_cap: upper bound of the weights that correct for the sampler (Yao et al. 2025); 0: no weights.
      aggregation: how token losses are averaged, "sequence", "token" or "constant" (by constant_length tokens).
      logprob_chunk: entries of the vocabulary whose logits exist at a time, for all tokens in the loss.
      microbatches: most parts of the groups whose gradients are taken one after the other; the update is the same.
        One microbatch, groups / microbatches, must fit into memory at full length (`grpo/microbatches.py`).
      refill: groups without contrast are replaced by further tasks, at most `refill` x `groups` of them a step (DAPO's
        dynamic sampling, arXiv 2503.14476); 0: none is.
      stream: takes gradients of microbatches while later ones still wait for experts. They are then of consecutive
        tasks, not of groups of like length, so that no result depends on who answers first.
    """

    steps: int = 200
    groups: int = 64
    group_size: int = 8
    advantage: Literal["std", "none", "leave_one_out"] = "std"
    surrogate: Surrogate = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_cap: float = 0.0
    aggregation: Aggregation = "sequence"
    constant_length: int = 2048
    entropy_weight: float = 0.0
    kl_weight: float = 0.0  # a pretrained policy needs no tie to its start
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    logprob_chunk: int = 2048  # of 151,936: 34 MB of fp32 logits for one group of 8 x 512 tokens in the loss
    microbatches: int = 1
    refill: int = 0
    stream: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a global-norm clip; the rate warms up linearly and, if `decay_steps` is not 0, falls to 0 by then.

    `moments`: how each of the two moments is kept, "float32" (4 bytes a parameter), "bfloat16" (2) or "int8" (1, and
    4 a row of the parameter's last axis; `quantise`).
    `offload`: whether the moments stay in the host's memory between updates (`update.py: init_train_state`).
    `max_skipped`: an update whose loss or gradient norm is not finite is skipped; after so many in a row the run stops
    with exit code 70 (docs/reliability.md).
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 5
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    moments: Moments = "float32"
    offload: bool = False
    max_skipped: int = 3
