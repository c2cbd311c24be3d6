"""From finished rollouts to the microbatches of an update: rewards, advantages, masks, static shapes."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from maestro_jax.grpo.advantages import group_advantages
from maestro_jax.grpo.logprobs import loss_rows
from maestro_jax.grpo.losses import LossCount
from maestro_jax.grpo.microbatches import Microbatch, Planner
from maestro_jax.grpo.update import GroupBatch, batch_shardings
from maestro_jax.parallel import cluster
from maestro_jax.parallel.sharding import from_processes
from maestro_jax.policy.prompts import take_prompts
from maestro_jax.rewards.reward import EpisodeSummary, RewardParts, Scorer, Turn
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards of a rollout's trajectories."""

    parts: list[list[RewardParts]]  # [tasks][G]
    rewards: np.ndarray  # float [B, G], 0 for groups that pad the batch, and without a verdict
    valid: np.ndarray  # bool [B, G], False for marked and padding members, and where a judge gave no verdict


def score_rollout(rollout: Rollout, scorer: Scorer) -> Scored:
    """Grades every trajectory that is not yet graded; the gold answers are read here only.

    Of several processes all call it, each with its own.
    """
    new = [t for group in rollout.trajectories for t in group if t.reward is None]
    decode = scorer.decode
    for trajectory, reward in zip(new, scorer([(t.task, summary(t, decode)) for t in new]), strict=True):
        trajectory.reward = reward
    parts = rewards_of(rollout.trajectories)
    rewards = np.zeros(rollout.length.shape)
    valid = np.zeros(rollout.length.shape, bool)
    for g, group in enumerate(rollout.trajectories):
        for m, trajectory in enumerate(group):
            if not parts[g][m].unjudged:
                rewards[g, m], valid[g, m] = parts[g][m].total, not trajectory.marked
    return Scored(parts, rewards, valid)


def rewards_of(groups: Sequence[Sequence[Trajectory]]) -> list[list[RewardParts]]:
    """Those of graded trajectories, member by member."""
    return [[t.reward for t in group if t.reward is not None] for group in groups]


def summary(trajectory: Trajectory, decode: Callable[[Sequence[int]], str] | None = None) -> EpisodeSummary:
    """What the reward needs of a trajectory; with `decode` (token ids → text), the policy's turns, too."""
    return EpisodeSummary(
        answer=trajectory.answer,
        executed_calls=trajectory.executed_calls,
        well_formed=trajectory.well_formed,
        price=trajectory.price,
        seconds=sum(observation.seconds for _, observation in trajectory.calls),
        calls=tuple(trajectory.calls),
        turns=() if decode is None else turns(trajectory, decode),
        asker=trajectory.key.tobytes().hex(),
    )


def turns(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> tuple[Turn, ...]:
    """What the policy wrote between what it was told."""
    whose = itertools.groupby(zip(trajectory.tokens, trajectory.authored, strict=True), key=lambda pair: pair[1])
    written = [[token for token, _ in run] for own, run in whose if own]
    return tuple(Turn(decode(tokens), len(tokens)) for tokens in written)


def make_microbatches(
    rollout: Rollout, scored: Scored, advantage: str, contrast_only: bool, planner: Planner, mesh: Mesh
) -> tuple[list[GroupBatch], list[list[str]], LossCount, dict[str, float]]:
    """The microbatches of the update's batch on the mesh: in each, as many groups of each process.

    Args:
      rollout: of this process.
      advantage: as of `GrpoConfig`.
      contrast_only: leaves out groups without contrast; right where the loss is nothing but advantages.

    Returns:
      The microbatches; the tasks of this process's groups in each, in the order of their rows; the count of the groups
      that are in none of them but in what the loss is divided by; and what is worth logging.
    """
    advantages, contrast = group_advantages(scored.rewards, scored.valid, advantage)
    mask = rollout.authored & scored.valid[..., None]
    facts = gather_facts(rollout, mask, scored.valid, contrast)
    wanted = facts.contrast if contrast_only else facts.loss_tokens > 0
    if not wanted.any():  # at least one group stays: without any, moments and rates would still have to move on
        wanted = np.broadcast_to(np.arange(wanted.shape[1]) == 0, wanted.shape)
    kept = [ranked(planner, *process) for process in zip(wanted, facts.prefix, facts.room, strict=True)]
    # Groups of one rank in their processes are planned as one, as long as the longest of them.
    prefixes, rooms, tokens = (largest_by_rank(x, kept) for x in (facts.prefix, facts.room, facts.loss_tokens))
    plan = planner.plan(prefixes, rooms)
    own = kept[jax.process_index()]
    microbatches, whose = [], []
    for microbatch in plan:
        groups = np.sort(own[[rank for rank in microbatch.groups if rank < len(own)]])
        most = max(tokens[rank] for rank in microbatch.groups)
        own_rows = take_microbatch(rollout, mask, advantages, groups, microbatch, most)
        microbatches.append(from_processes(own_rows, batch_shardings(mesh)))
        whose.append([group[0].task.id for n in groups for group in rollout.trajectories[n : n + 1]])
    left_out = LossCount(int(facts.loss_tokens[~wanted].sum()), int(facts.loss_members[~wanted].sum()))
    real = facts.real
    members = real.sum() * rollout.length.shape[1]
    tasks = real.sum() + facts.replaced.sum()
    metrics = {
        "groups_without_contrast": 1.0 - float(facts.contrast[real].sum() / tasks),
        "marked_trajectories": float(facts.marked[real].sum() / members),
        "member_tokens": float(facts.tokens[real].sum() / members),
        "parts": float(len(microbatches)),
        "padding": planner.padding(plan * len(kept), facts.prefix[wanted].tolist(), facts.room[wanted].tolist()),
    }
    if rollout.replaced is not None:
        metrics |= {"tasks": float(tasks), "refilled": float(facts.refilled.sum())}
    return microbatches, whose, left_out, metrics


def ranked(planner: Planner, wanted: np.ndarray, prefixes: np.ndarray, rooms: np.ndarray) -> np.ndarray:
    """Numbers of the wanted groups of a process, the most expensive first."""
    groups = np.flatnonzero(wanted)
    return groups[planner.rank(prefixes[groups].tolist(), rooms[groups].tolist())]


def largest_by_rank(fact: np.ndarray, kept: Sequence[np.ndarray]) -> list[int]:
    """The largest `fact [processes, B]` of the groups of each rank in their processes; some have fewer than others."""
    found = [process[groups] for process, groups in zip(fact, kept, strict=True)]
    return [int(max(row[rank] for row in found if rank < len(row))) for rank in range(max(map(len, found)))]


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """What all processes know of each other's groups, which is all that a plan needs: numbers `[processes, B]`.

    Attributes:
      refilled, replaced: of a process, `[processes, 1]`, as in `Rollout`.
    """

    prefix: np.ndarray  # tokens
    room: np.ndarray  # tokens of the longest member
    loss_tokens: np.ndarray
    loss_members: np.ndarray
    contrast: np.ndarray  # bool
    marked: np.ndarray  # members
    tokens: np.ndarray  # of all members
    real: np.ndarray  # bool, False for groups that pad the batch
    refilled: np.ndarray
    replaced: np.ndarray


def gather_facts(rollout: Rollout, mask: np.ndarray, valid: np.ndarray, contrast: np.ndarray) -> GroupFacts:
    """All processes call it, each with its own groups."""
    own = GroupFacts(
        prefix=rollout.prompts.mask.sum(axis=1),
        room=rollout.length.max(axis=1),
        loss_tokens=mask.sum(axis=(1, 2)),
        loss_members=mask.any(axis=2).sum(axis=1),
        contrast=contrast,
        marked=(~valid).sum(axis=1),
        tokens=rollout.length.sum(axis=1),
        real=np.arange(len(mask)) < max(len(rollout.trajectories), 1),
        refilled=np.array([rollout.refilled]),
        replaced=np.array([len(rollout.replaced or ())]),
    )
    told = cluster.gather({name: fact.tolist() for name, fact in vars(own).items()})
    return GroupFacts(**{name: np.array([process[name] for process in told]) for name in vars(own)})


def take_microbatch(
    rollout: Rollout, mask: np.ndarray, advantages: np.ndarray, groups: np.ndarray, shape: Microbatch, most: int = 0
) -> GroupBatch:
    """Groups of a rollout in the static shape of a microbatch, numpy-valued; padding repeats the first one.

    Args:
      groups: at most `shape.size`; none, where a microbatch has groups of other processes only.
      most: as of `loss_rows`.
    """
    real = np.arange(shape.size) < len(groups)
    rows = np.append(groups, np.repeat(groups[:1] if len(groups) else 0, shape.size - len(groups)))
    prompts, logprobs = take_prompts(rollout.prompts, rows, shape.prefix), rollout.logprobs[rows, :, : shape.room]
    mask = mask[rows, :, : shape.room] & real[:, None, None]
    return GroupBatch(
        # What pads a microbatch without groups may be longer than it.
        prompts=dataclasses.replace(prompts, last=np.minimum(prompts.last, shape.prefix - 1)),
        tokens=rollout.tokens[rows, :, : shape.room],
        length=np.minimum(rollout.length[rows], shape.room),
        mask=mask,
        old_logprobs=logprobs,
        reference_logprobs=np.zeros_like(logprobs),
        advantages=advantages[rows] * real[:, None],
        loss_rows=loss_rows(mask, most),
    )
