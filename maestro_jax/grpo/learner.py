"""One step of learning: rewards, advantages and gradients of groups as they come, then one update."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from maestro_jax import failpoints
from maestro_jax.grpo.advantages import group_advantages
from maestro_jax.grpo.batch import Scored, make_microbatches, rewards_of, score_rollout
from maestro_jax.grpo.microbatches import Planner
from maestro_jax.grpo.skipped import Skipped
from maestro_jax.grpo.update import NOTHING, GroupBatch, Total, TrainState, TrainStep
from maestro_jax.rewards.reward import Scorer
from maestro_jax.rollout.engine import Rollout


@dataclasses.dataclass(frozen=True)
class Learner:
    """What an update is made with.

    Attributes:
      contrast_only: leaves out groups without contrast; right where the loss is nothing but advantages.
      rollouts_per_step: in how many a step's groups come.
      prepare: fills in what the batch does not know by itself (the reference's log-probabilities).
    """

    step: TrainStep
    planner: Planner
    reward: Scorer
    advantage: str
    contrast_only: bool
    rollouts_per_step: int
    prepare: Callable[[GroupBatch], GroupBatch]
    mesh: Mesh

    def __call__(
        self, state: TrainState, rollouts: Iterable[Rollout], on_skip: Callable[[Skipped], None] = lambda skipped: None
    ) -> tuple[TrainState, list[tuple[Rollout, Scored]], dict[str, float]]:
        """One update from the groups of a step.

        Args:
          rollouts: the step's groups, as a whole or in several whose gradients are added up as they come.
          on_skip: hears of an update that changed nothing, since it would not have been finite.

        Returns:
          The new state, the rollouts with their rewards, and metrics of batch and update.
        """
        seen: list[tuple[Rollout, Scored]] = []
        found: list[dict[str, float]] = []
        total: Total | None = None
        tasks: list[list[str]] = []
        left_out = NOTHING
        spoils = failpoints.reach("before_update")
        for rollout in rollouts:
            scored = score_rollout(rollout, self.reward)
            given = rollout
            if spoils:
                given = dataclasses.replace(rollout, logprobs=np.full_like(rollout.logprobs, np.nan))
            microbatches, whose, without, metrics = make_microbatches(
                given, scored, self.advantage, self.contrast_only, self.planner, self.mesh
            )
            seen.append((rollout, scored))
            found.append(metrics)
            left_out = left_out + without
            tasks += whose
            with jax.set_mesh(self.mesh):
                for microbatch in microbatches:
                    # As the settings say, so that it is one program however few groups have contrast.
                    alone = self.rollouts_per_step == self.planner.microbatches == 1
                    total = total or self.step.begin(alone)
                    total = self.step.add(state.params, total, self.prepare(microbatch))
        # Groups that no judge can judge have no contrast, and are the first to be replaced: they count, too.
        groups = [group for made, scored in seen for group in (*scored.parts, *rewards_of(made.replaced or ()))]
        self.reward.check([parts.unjudged for group in groups for parts in group])
        with jax.set_mesh(self.mesh):
            assert total is not None  # at least one group of a step is in a microbatch
            state, update = self.step.finish(state, total, left_out)
        if update["skipped"]:
            on_skip(Skipped.named(update, total, tasks))
        return state, seen, joined(found) | {name: float(value) for name, value in update.items()}

    def contrast(self, rollout: Rollout) -> np.ndarray:
        """Which groups would move the policy: bool `[B]`, whether the valid members of each differ in reward."""
        scored = score_rollout(rollout, self.reward)
        return group_advantages(scored.rewards, scored.valid, self.advantage)[1]


def joined(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's rollouts: microbatches are counted, all else is averaged (rollouts are of equal size)."""
    means = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}
    return means | {"parts": float(sum(metrics["parts"] for metrics in found))}
