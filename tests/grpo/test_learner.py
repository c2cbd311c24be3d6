"""One step of learning: the same update from a step's groups as a whole and as they come, in several rollouts."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from maestro_jax import failpoints
from maestro_jax.checkpoint.store import named_leaves
from maestro_jax.errors import ConfigError, NonFiniteError
from maestro_jax.grpo.batch import Scored
from maestro_jax.grpo.learner import Learner
from maestro_jax.grpo.ledger import trained_row
from maestro_jax.grpo.losses import LossConfig
from maestro_jax.grpo.microbatches import Planner
from maestro_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from maestro_jax.grpo.skipped import NAMED, Skipped, Skips
from maestro_jax.grpo.update import (
    NOTHING,
    GroupBatch,
    TrainState,
    UpdateConfig,
    grpo_loss,
    init_train_state,
    make_train_step,
)
from maestro_jax.parallel.sharding import replicated
from maestro_jax.policy.prompts import take_prompts
from maestro_jax.policy.tokens import Tokens
from maestro_jax.rewards.graders import Graders
from maestro_jax.rewards.reward import RewardConfig, RewardParts, Scorer
from maestro_jax.rollout.engine import Rollout
from maestro_jax.training.loop import episode_metrics
from maestro_jax.types import Call, Observation, Status
from tests.rollout import toy
from tests.rollout.test_engine import EPISODE, Experts, Runner, make_runner, one_device

GROUPS, MEMBERS = 4, 3


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    tokens: Tokens = toy.make_tokens(tmp_path_factory.mktemp("tokens"))
    graph, params = nnx.split(toy.policy(), nnx.Param)
    mesh = one_device()
    made = make_runner(graph, jax.device_put(params, replicated(mesh)), mesh, tokens, Experts(0.0, seed=0))
    yield made
    made.dispatcher.close()


@pytest.fixture(scope="module")
def rollout(runner: Runner) -> Rollout:
    """Episodes of a random policy, some of which are told to have gone well; the third group has no contrast."""
    tasks = [dataclasses.replace(toy.task(n), source="reading") for n in range(GROUPS)]
    found = runner.engine.rollout(runner.params, tasks, GROUPS, MEMBERS, seed=0, step=1, greedy=False)
    for g, group in enumerate(found.trajectories):
        for m, trajectory in enumerate(group):
            trajectory.answer, trajectory.well_formed = "seven" if m == 0 or g == 2 else "six", True
            trajectory.calls = [(Call("Lens", "Charting", "look"), Observation("7", Status.OK))]
    return found


def test_groups_that_were_replaced_count_among_those_without_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no contrast, so that refilling leaves out just those that a judge cannot judge."""

    class Judged:
        def check(self, unjudged: Sequence[str]) -> None:
            raise ConfigError(" ".join(name or "judged" for name in unjudged))

    fine, lost = RewardParts(1.0, 0.0, 0.0, 0.0, 1.0), RewardParts(np.nan, 0.0, 0.0, 0.0, np.nan, {}, "Referee")
    left_out = [[SimpleNamespace(reward=lost), SimpleNamespace(reward=lost)]]
    scored = Scored([[fine, fine]], np.ones((1, 2)), np.ones((1, 2), bool))
    monkeypatch.setattr("maestro_jax.grpo.learner.score_rollout", lambda *_: scored)
    monkeypatch.setattr("maestro_jax.grpo.learner.make_microbatches", lambda *_: ([], [], NOTHING, {}))
    plan: Any = SimpleNamespace(microbatches=1)
    made: Any = Learner(None, plan, Judged(), "grpo", True, 1, None, one_device())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="judged judged Referee Referee"):
        made(None, [SimpleNamespace(replaced=left_out)])


def learner(runner: Runner, rollouts: int) -> tuple[Learner, TrainState]:
    engine = runner.engine
    optimizer = make_optimizer(OptimizerConfig(1e-3, 0, 0, 0.9, 0.95, 1e-8, 0.0, 1.0, "float32", False))
    params = jax.tree.map(lambda x: x.copy(), runner.params)
    state = init_train_state(params, optimizer, (), engine.mesh)
    config = UpdateConfig(LossConfig(0.2, 0.2, "token", 1), 1.0, 128, ())
    step = make_train_step(engine.graph, optimizer, grpo_loss, config, engine.mesh, state)
    root = len(engine.prompts.root)
    planner = Planner(toy.architecture(), root, MEMBERS, GROUPS // rollouts, 1, 1, (32,), (EPISODE.room,))
    return Learner(step, planner, Scorer(), "std", True, rollouts, lambda p: p, engine.mesh), state


def test_few_groups_with_contrast_need_no_program_of_their_own(runner: Runner, rollout: Rollout) -> None:
    """A microbatch holds them all, so there is one; a program for those that come alone would take as long."""
    made, state = learner(runner, rollouts=1)
    given: list[bool] = []

    def accumulate(params: Any, total: Any, microbatch: GroupBatch) -> Any:
        given.append(total is not None)
        return made.step.accumulate(params, total, microbatch)

    planner = dataclasses.replace(made.planner, microbatches=2)
    apart = dataclasses.replace(made, planner=planner, step=dataclasses.replace(made.step, accumulate=accumulate))
    same = dataclasses.replace(rollout, trajectories=[rollout.trajectories[0], *[rollout.trajectories[2]] * 3])
    after, _, found = apart(state, [same])
    assert found["parts"] == 1.0 and found["groups_without_contrast"] == 0.75 and int(after.step) == 1
    assert given == [True]
    _, state = learner(runner, rollouts=1)
    _, _, wanted = made(state, [same])
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5, atol=1e-7)


def halves(rollout: Rollout) -> Sequence[Rollout]:
    def some(rows: np.ndarray) -> Rollout:
        prompts = take_prompts(rollout.prompts, rows, rollout.prompts.tokens.shape[1])
        arrays = (getattr(rollout, name)[rows] for name in ("tokens", "logprobs", "authored", "length"))
        return Rollout([rollout.trajectories[row] for row in rows], prompts, *arrays)

    return [some(np.array([0, 1])), some(np.array([2, 3]))]


def test_groups_that_come_in_parts_make_the_same_update(runner: Runner, rollout: Rollout) -> None:
    whole, state = learner(runner, rollouts=1)
    _, seen, wanted = whole(state, [rollout])
    assert len(seen) == 1 and wanted["parts"] == 1.0 and wanted["groups_without_contrast"] == 0.25
    streamed, state = learner(runner, rollouts=2)
    after, seen, found = streamed(state, iter(halves(rollout)))
    assert len(seen) == 2 and found["parts"] == 2.0 and int(after.step) == 1
    for name in ("loss", "grad_norm", "entropy", "member_tokens", "groups_without_contrast"):
        # fp32 sums over the same tokens in another order.
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("rollouts", [1, 2])
def test_a_run_goes_on_as_if_an_update_that_is_not_finite_had_not_come(
    rollouts: int, runner: Runner, rollout: Rollout
) -> None:
    """A NaN at step 5 of ten, in groups that come as a whole and in parts."""

    def run(steps: Sequence[int], failpoint: str = "") -> tuple[TrainState, dict[int, Skipped], list[float]]:
        made, state = learner(runner, rollouts)
        failpoints.arm(failpoint)
        skipped: dict[int, Skipped] = {}
        metrics = []
        for step in steps:
            given = halves(rollout) if rollouts == 2 else [rollout]
            state, _, found = made(state, given, functools.partial(skipped.__setitem__, step))
            metrics.append(found["skipped"])
        failpoints.arm("")
        return state, skipped, metrics

    state, skipped, metrics = run(range(1, 11), "before_update:5:NAN")
    wanted, none, _ = run([step for step in range(1, 11) if step != 5])
    assert metrics == [0.0] * 4 + [1.0] + [0.0] * 5 and not none and list(skipped) == [5]
    assert int(state.step) == 9
    for name, leaf in named_leaves(wanted).items():
        np.testing.assert_array_equal(named_leaves(state)[name], leaf, err_msg=name)
    seen = skipped[5]
    assert len(seen.tensors) == seen.of == len(named_leaves(state.params))
    assert seen.tensors[0] == "language_model/norm/scale"
    assert seen.tasks == [toy.task(n).id for n in (0, 1, 3)]  # the third has no contrast


def test_the_task_that_spoils_an_update_is_named(runner: Runner, rollout: Rollout) -> None:
    made, state = learner(runner, rollouts=1)
    logprobs = rollout.logprobs.copy()
    logprobs[1, 0, int(rollout.authored[1, 0].argmax())] = -np.inf
    skipped: list[Skipped] = []
    before = {name: np.array(leaf) for name, leaf in named_leaves(state).items()}
    state, seen, found = made(state, [dataclasses.replace(rollout, logprobs=logprobs)], skipped.append)
    assert found["skipped"] == 1.0 and found["update_norm"] == 0.0 and not np.isfinite(found["grad_norm"])
    for name, leaf in named_leaves(state).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    (one,) = skipped
    assert one.tasks == [toy.task(1).id]
    row = trained_row(1, seen, one)["skipped"]
    assert row["tasks"] == {"count": 1, "first": [toy.task(1).id]} and row["tensors"]["count"] == one.of
    assert len(row["tensors"]["first"]) == NAMED and not row["grad_norm_is_finite"]


def test_a_run_stops_after_several_skipped_updates_in_a_row() -> None:
    told: list[str] = []
    skips = Skips(3, "config.optimizer", told.append)
    one = Skipped(np.nan, np.inf, ["a/kernel"], 4, ["t/1", "t/2", "t/3", "t/4"])
    for step, skipped in enumerate([one, one, None, one, one]):
        skips.after(f"step {step}", skipped)
    assert len(told) == 4 and skips.in_a_row == 2
    assert told[0] == (
        "the update of step 0 is skipped: loss nan, gradient norm inf; not finite: 1 of 4 gradients (first a/kernel), "
        "the loss of t/1, t/2, t/3, ..."
    )
    with pytest.raises(NonFiniteError, match=r"^3 updates in a row were skipped, up to step 5: .*max_skipped") as error:
        skips.after("step 5", dataclasses.replace(one, tasks=[]))
    assert "no task's own loss" in str(error.value) and "\n" not in str(error.value)
    again = Skips(3, "config.optimizer", told.append, in_a_row=2)  # of an earlier start
    with pytest.raises(NonFiniteError):
        again.after("step 6", one)


def test_the_ledger_has_every_task_that_was_run_once(runner: Runner, rollout: Rollout) -> None:
    """The learner says which groups have contrast; what another took the place of is no part of the update."""
    made, state = learner(runner, rollouts=1)
    assert made.contrast(rollout).tolist() == [True, True, False, True]
    whole = dataclasses.replace(rollout, refilled=1, replaced=[rollout.trajectories[2]])
    _, seen, metrics = made(state, [whole])
    row = trained_row(3, seen)
    assert [group["task"] for group in row["groups"]] == [toy.task(n).id for n in range(GROUPS)]
    assert row["replaced"] == [{"task": toy.task(2).id, "rewards": [1.0] * MEMBERS}]
    assert "replaced" not in trained_row(3, [(rollout, seen[0][1])])
    graded = episode_metrics(seen, version=1)
    assert graded["accuracy"] == pytest.approx(9 / 15) and metrics["tasks"] == 5.0


def ungraded(rollout: Rollout) -> Rollout:
    """The same, for another scorer: an episode is graded once."""
    groups = [[dataclasses.replace(t, reward=None) for t in group] for group in rollout.trajectories]
    return dataclasses.replace(rollout, trajectories=groups)


def test_partial_credit_and_terms_of_ones_own_are_in_the_metrics_of_a_step(runner: Runner, rollout: Rollout) -> None:
    made, state = learner(runner, rollouts=1)
    graders = Graders({"reading": "tests.rewards.mine:share_of_letters"})
    terms = {"brevity": {"term": "tests.rewards.mine:brevity", "weight": -0.001}}
    scorer = Scorer(RewardConfig(terms=terms), graders, decode=runner.engine.prompts.tokens.decode)
    _, seen, _ = dataclasses.replace(made, reward=scorer)(state, [ungraded(rollout)])
    found = episode_metrics(seen, version=1)
    # "seven" gets all, "six" one letter of five; 6 of 12 members are right.
    assert found["accuracy"] == pytest.approx((6 + 6 / 5) / 12)
    written = np.mean([sum(t.authored) for group in rollout.trajectories for t in group])
    assert found["reward/brevity"] == pytest.approx(-0.001 * written)
    assert found["reward"] == pytest.approx(found["accuracy"] + found["format"] + found["reward/brevity"])
    assert all(value == pytest.approx(sum(parts)) for value, parts in _sums(seen))


def _sums(seen: list[tuple[Rollout, Scored]]) -> Iterator[tuple[float, list[float]]]:
    for _, scored in seen:
        for one in (one for group in scored.parts for one in group):
            yield one.total, [one.outcome, one.format, one.cost, one.latency, *one.terms.values()]


def test_an_episode_without_a_verdict_counts_nowhere(runner: Runner, rollout: Rollout) -> None:
    class Silent(Scorer):
        def __call__(self, episodes: Any) -> list[RewardParts]:
            found = super().__call__(episodes)
            return [dataclasses.replace(found[0], outcome=np.nan, total=np.nan, unjudged="Referee"), *found[1:]]

    made, state = learner(runner, rollouts=1)
    after, seen, found = dataclasses.replace(made, reward=Silent())(state, [ungraded(rollout)])
    assert not seen[0][1].valid[0, 0] and seen[0][1].valid.sum() == GROUPS * MEMBERS - 1
    assert found["marked_trajectories"] == pytest.approx(1 / 12) and np.isfinite(found["loss"])
    assert episode_metrics(seen, version=1)["accuracy"] == pytest.approx(5 / 11)
    assert trained_row(1, seen)["groups"][0]["rewards"][0] is None


def test_the_sampler_and_the_trainer_agree(runner: Runner, rollout: Rollout) -> None:
    whole, state = learner(runner, rollouts=1)
    assert whole(state, [rollout])[2]["logprob_gap"] < 2e-5
