"""Settings of episodes and decoding, with their defaults."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Episodes and decoding; lengths in tokens, times in seconds.

    Attributes:
      max_calls: calls per episode; after them the policy may only answer.
      turn_budget: most tokens of one turn, its thought included.
      earlier_thoughts: of a checkpoint whose chat template opens thoughts: "keep" leaves those of earlier turns in the
        context, as they were sampled; "drop" shows earlier turns as the template renders them, without. Training keeps
        them: it computes a whole episode in one pass, in which every turn has the same history.
      observation_tokens: most tokens of an observation's text.
      room: most tokens of a member, turns and observations together; 0: what the longest episode needs, computed from
        the settings above and the run's tokens (`rollout/limits.py`). A smaller one cuts longer episodes.
      member_buckets: static member lengths below `room` that the update is compiled for, besides `room` itself.
      lanes: trajectories that decode side by side; 0 gives every trajectory in flight a lane. With fewer, a lane
        whose trajectory waits for an expert goes to another one.
      decode_chunk: tokens between two exchanges with the experts.
      append_rows: lanes that receive an observation per program call; 0: all of them.
      prefill_groups: groups prefilled per program call; 0: all of them.
      parked_tokens: room for keys and values of trajectories without a lane, in the memory of each batch shard.
      parked_on_host: the same in the memory of each host, in bytes. Without any room, lanes are held.
      temperature: divides the logits when episodes are sampled; above 0.
      deadline: seconds an episode may wait for experts, over all its calls.
      ahead: batches of tasks that are under way besides a step's own; 0 is on-policy.
      staleness: a group is trained at most so many updates after its episodes began; at least `ahead`.
      max_marked: the largest share of a step's episodes that may be left out because an expert failed; with more, the
        step waits and they are run again. Also of an evaluation's.
      patience: seconds to wait for experts that are out, before the run stops with exit code 75.

    For tiny policies only:
      observation_multiple: fills an observation's text up with full stops to a multiple of so many tokens (1: not at
        all), so that a quote stands at the same distance from what it quotes; a tiny policy needs that to learn
        quoting.
    """

    max_calls: int = 4
    turn_budget: int = 256
    earlier_thoughts: Literal["keep", "drop"] = "keep"
    observation_tokens: int = 160
    room: int = 0
    member_buckets: tuple[int, ...] = (512, 1024)
    lanes: int = 0
    decode_chunk: int = 16
    append_rows: int = 64
    prefill_groups: int = 0
    parked_tokens: int = 0
    parked_on_host: int = 0
    temperature: float = 1.0
    deadline: float = 120.0
    ahead: int = 0
    staleness: int = 0
    max_marked: float = 0.2
    patience: float = 600.0
    # For tiny policies only.
    observation_multiple: int = 1
