"""From finished rollouts to the microbatches of an update's batch: who is in the loss, and what is counted."""

import dataclasses

import jax
import numpy as np
import pytest

from maestro_jax.errors import DataError
from maestro_jax.grpo.batch import Scored, make_microbatches, score_rollout, summary, take_microbatch
from maestro_jax.grpo.losses import LossCount
from maestro_jax.grpo.microbatches import Microbatch, Planner
from maestro_jax.grpo.update import GroupBatch
from maestro_jax.parallel import cluster
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.model import PrefixBatch
from maestro_jax.rewards.reward import EpisodeSummary, Scorer, Turn
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.trajectory import Trajectory
from maestro_jax.types import Call, Observation, Status, Task, Usage
from tests.policy import reference

G, R = 3, 16
TASK = Task("counting/train/00001", "how many?", (), ("4",), "counting")
CALL = Call("Tally", "Counting_Problem_Solver", "count")


def trajectory(answer: str | None, **fields: object) -> Trajectory:
    """An episode with one executed call that took 2 s and cost 0.5 dollars."""
    observation = Observation("4", Status.OK, seconds=2.0, usage=Usage(price=0.5))
    return Trajectory(TASK, 0, calls=[(CALL, observation)], answer=answer, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Group 0 has contrast and a marked member, group 1 has none, group 2 pads the batch."""
    groups = [
        [trajectory("4"), trajectory("5"), trajectory("4", marked=True)],
        [trajectory("5"), trajectory("6"), trajectory(None)],
    ]
    groups[1][2].answer = "7"
    rng = np.random.default_rng(0)
    length = np.array([[9, 6, 11], [5, 5, 5], [0, 0, 0]], np.int32)
    authored = (np.arange(R) < length[..., None]) & (np.arange(R) % 3 > 0)  # some tokens are observations
    tokens = reference.members(3, G, R)
    logprobs = rng.uniform(-2, 0, (3, G, R)).astype(np.float32)
    prompts: PrefixBatch = reference.collate([1, 2], [reference.row(5)] * 3, width=4, per_group=1, patches=4)
    return Rollout(groups, jax.tree.map(np.asarray, prompts), tokens, logprobs, authored, length)


Parts = tuple[list[GroupBatch], LossCount, dict[str, float]]


def microbatches_of(
    rollout: Rollout, buckets: tuple[int, ...] = (12, 16), microbatches: int = 1, contrast_only: bool = False
) -> Parts:
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    planner = Planner(reference.architecture(), 2, G, 3, microbatches, 1, (2, 4), buckets)
    scored = score_rollout(rollout, Scorer())
    parts, tasks, left_out, metrics = make_microbatches(rollout, scored, "std", contrast_only, planner, mesh)
    assert len(tasks) == len(parts)
    return parts, left_out, metrics


def batch_of(rollout: Rollout, buckets: tuple[int, ...] = (12, 16)) -> tuple[GroupBatch, dict[str, float]]:
    """The one microbatch, in which the group that padded the rollout is replaced by other padding."""
    (microbatch,), _, metrics = microbatches_of(rollout, buckets)
    return microbatch, metrics


def test_rewards_and_who_counts(rollout: Rollout) -> None:
    scored: Scored = score_rollout(rollout, Scorer())
    assert scored.rewards.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert scored.valid.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert [len(group) for group in scored.parts] == [3, 3]


def test_only_authored_tokens_of_valid_members_are_in_the_loss(rollout: Rollout) -> None:
    batch, _ = batch_of(rollout)
    mask = np.asarray(batch.mask)
    np.testing.assert_array_equal(mask[0, :2], rollout.authored[0, :2, :12])
    np.testing.assert_array_equal(mask[1], rollout.authored[1, :, :12])  # no contrast, yet counted in the mean
    assert mask[0, :2].any() and mask[1].any() and not mask[0, 2].any() and not mask[2:].any()


def test_advantages_leave_the_marked_member_out(rollout: Rollout) -> None:
    advantages = np.asarray(batch_of(rollout)[0].advantages)
    np.testing.assert_allclose(advantages[0], [1, -1, 0], atol=1e-5)  # epsilon of the deviation
    assert not advantages[1:].any()


def test_arrays_are_cut_to_the_buckets_and_otherwise_as_sampled(rollout: Rollout) -> None:
    batch, _ = batch_of(rollout)
    np.testing.assert_array_equal(batch.tokens[:2], rollout.tokens[:2, :, :12])
    np.testing.assert_array_equal(batch.old_logprobs[:2], rollout.logprobs[:2, :, :12])
    np.testing.assert_array_equal(batch.length[:2], rollout.length[:2])
    np.testing.assert_array_equal(batch.prompts.tokens[:2], rollout.prompts.tokens[:2, :2])
    assert batch_of(rollout, (16,))[0].tokens.shape == (3, G, 16)


def test_groups_without_contrast_are_left_out_and_counted(rollout: Rollout) -> None:
    (microbatch,), left_out, metrics = microbatches_of(rollout, (8, 16), 3, contrast_only=True)
    np.testing.assert_array_equal(microbatch.tokens, rollout.tokens[:1])
    assert left_out == LossCount(rollout.authored[1].sum(), G)
    assert metrics["parts"] == 1.0 and metrics["groups_without_contrast"] == 0.5
    microbatches, left_out, metrics = microbatches_of(rollout, (8, 16), 3)
    assert [m.tokens.shape for m in microbatches] == [(1, G, 16), (1, G, 8)] and left_out == LossCount(0, 0)
    assert metrics["parts"] == 2.0


def test_without_any_contrast_a_group_stays(rollout: Rollout) -> None:
    """Moments and rate move on at every step, and what is left out needs a microbatch to be counted with."""
    same = dataclasses.replace(rollout, trajectories=[rollout.trajectories[1]] * 2)
    (microbatch,), left_out, _ = microbatches_of(same, microbatches=3, contrast_only=True)
    assert microbatch.tokens.shape[0] == 1 and not np.asarray(microbatch.advantages).any()
    assert left_out == LossCount(rollout.authored[1].sum(), G)


def test_padding_of_a_microbatch_is_out_of_the_loss(rollout: Rollout) -> None:
    mask, advantages = rollout.authored, np.ones((3, G), np.float32)
    microbatch = take_microbatch(rollout, mask, advantages, np.array([1]), Microbatch((1,), 2, 2, 8))
    np.testing.assert_array_equal(microbatch.tokens, rollout.tokens[[1, 1], :, :8])
    np.testing.assert_array_equal(microbatch.mask[0], mask[1, :, :8])
    assert not microbatch.mask[1].any() and not microbatch.advantages[1].any() and microbatch.advantages[0].all()


def test_microbatches_have_the_shapes_that_another_process_needs(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has three groups with contrast, shorter and longer than ours; we have one, so two of them get none of us."""
    theirs = {"prefix": [2, 4, 2], "room": [8, 15, 3], "loss_tokens": [20, 30, 6], "loss_members": [3, 3, 3]}
    theirs |= {"contrast": [True] * 3, "marked": [0] * 3, "tokens": [20, 40, 9], "real": [True] * 3}
    theirs |= {"refilled": [0], "replaced": [0]}
    monkeypatch.setattr(cluster, "gather", lambda own: [own, theirs])
    microbatches, left_out, metrics = microbatches_of(rollout, (4, 8, 16), 3, contrast_only=True)
    # As the most expensive of each process go together: P and R of theirs, or of ours where it is longer.
    shapes = [(microbatch.prompts.tokens.shape[1], microbatch.tokens.shape[2]) for microbatch in microbatches]
    assert shapes == [(4, 16), (2, 8), (2, 4)]
    assert [bool(np.asarray(microbatch.mask).any()) for microbatch in microbatches] == [True, False, False]
    np.testing.assert_array_equal(microbatches[0].tokens[0], rollout.tokens[0])
    for (prefix, room), microbatch, most in zip(shapes, microbatches, (30, 20, 6), strict=True):
        assert microbatch.tokens.shape[0] == 1 and microbatch.loss_rows.shape[1] >= most
        assert np.max(microbatch.prompts.last) < prefix and np.max(microbatch.length) <= room
        assert np.isfinite(microbatch.advantages).all()
    assert left_out == LossCount(rollout.authored[1].sum(), G)  # our group without contrast
    assert metrics["groups_without_contrast"] == 1 - 4 / 5 and metrics["parts"] == 3.0


def test_statistics_leave_padding_groups_out(rollout: Rollout) -> None:
    metrics = batch_of(rollout)[1]
    assert metrics["groups_without_contrast"] == 0.5
    assert metrics["marked_trajectories"] == pytest.approx(1 / 6)
    assert metrics["member_tokens"] == pytest.approx(41 / 6)


def test_statistics_know_the_groups_that_others_took_the_place_of(rollout: Rollout) -> None:
    """Of the data, five tasks were run: two are trained on, one of them without contrast; three are replaced."""
    refilled = dataclasses.replace(rollout, refilled=1, replaced=[rollout.trajectories[1]] * 3)
    metrics = batch_of(refilled)[1]
    assert (metrics["groups_without_contrast"], metrics["tasks"], metrics["refilled"]) == (4 / 5, 5.0, 1.0)
    assert {"tasks", "refilled"}.isdisjoint(batch_of(rollout)[1])


def test_a_member_beyond_the_buckets_names_the_cure(rollout: Rollout) -> None:
    with pytest.raises(DataError, match="a member needs 11, the largest bucket is 8; raise config.rollout.member_buck"):
        batch_of(rollout, (8,))


def test_a_summary_sums_over_calls() -> None:
    one = trajectory("4", well_formed=False)
    one.calls.append((CALL, Observation("broken", Status.UNKNOWN, seconds=1.0)))
    asker = one.key.tobytes().hex()
    assert summary(one) == EpisodeSummary("4", 1, False, price=0.5, seconds=3.0, calls=tuple(one.calls), asker=asker)
    assert summary(one).turns == ()


def test_turns_are_what_the_policy_wrote_between_what_it_was_told() -> None:
    one = trajectory("4", tokens=[1, 2, 3, 4, 5, 6], authored=[True, True, False, False, True, True])
    assert summary(one, lambda ids: f"{ids}").turns == (Turn("[1, 2]", 2), Turn("[5, 6]", 2))
