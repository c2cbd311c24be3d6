"""Demonstrations as batches of groups, and the order in which they are seen."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from maestro_jax.errors import DataError
from maestro_jax.grpo.update import GroupBatch
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.prompts import PromptConfig, Prompts
from maestro_jax.policy.tokens import Tokens
from maestro_jax.types import Task
from maestro_jax.warm_start.demonstrations import Demonstration
from maestro_jax.warm_start.finetune import collate, finetune
from tests.policy import reference

BUCKETS = (4, 8)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def prompts(tokens: Tokens) -> Prompts:
    config = PromptConfig((64,), (4,), images_per_task=1, min_pixels=1024, max_pixels=1024)
    return Prompts(tokens, reference.architecture_for(tokens), "system", config)


def groups_of(tasks: list[Task], count: int) -> list[list[Demonstration]]:
    """Groups of two; the first token of each member is its group's number."""
    return [
        [Demonstration(tasks[g], (g, 20, 21), (True, False, True)), Demonstration(tasks[g], (g,), (True,))]
        for g in range(count)
    ]


def test_members_are_padded_and_only_authored_tokens_count(prompts: Prompts, tasks: list[Task], mesh: Mesh) -> None:
    batch = collate(groups_of(tasks, 2), prompts, BUCKETS, mesh)
    assert np.asarray(batch.tokens).tolist() == [[[g, 20, 21, 0], [g, 0, 0, 0]] for g in range(2)]
    assert np.asarray(batch.length).tolist() == [[3, 1]] * 2
    assert np.asarray(batch.mask).astype(int).tolist() == [[[1, 0, 1, 0], [1, 0, 0, 0]]] * 2
    shown = prompts.batch(tasks[:2])
    np.testing.assert_array_equal(batch.prompts.tokens, shown.tokens)


def test_a_long_demonstration_names_the_cure(prompts: Prompts, tasks: list[Task], mesh: Mesh) -> None:
    long = [[Demonstration(tasks[0], tuple(range(9)), (True,) * 9)]]
    with pytest.raises(DataError, match="a demonstration needs 9, the largest bucket is 8; set config.rollout.room=0"):
        collate(long, prompts, BUCKETS, mesh)


def seen(
    prompts: Prompts, tasks: list[Task], mesh: Mesh, seed: int, steps: int, done: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Which groups each step got, and what was reported."""
    batches: list[list[int]] = []

    def step(state: int, parts: list[GroupBatch]) -> tuple[int, dict[str, float]]:
        (batch,) = parts
        batches.append(np.asarray(batch.tokens)[:, 0, 0].tolist())
        return state + 1, {"loss": 1.0, "grad_norm": 2.0}

    given = list(finetune(step, done, groups_of(tasks, 5), 3, 2, steps, prompts, BUCKETS, mesh, seed, done))
    assert [state for _, state, _ in given] == list(range(done + 1, steps + 1))
    return batches, [number for number, _, _ in given]


def test_every_pass_sees_every_group_once_in_a_new_order(prompts: Prompts, tasks: list[Task], mesh: Mesh) -> None:
    batches, reported = seen(prompts, tasks, mesh, seed=0, steps=10)
    stream = [group for batch in batches for group in batch]
    passes = [stream[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert reported == list(range(1, 11))


def test_the_seed_decides_the_order(prompts: Prompts, tasks: list[Task], mesh: Mesh) -> None:
    first = seen(prompts, tasks, mesh, seed=0, steps=5)
    assert seen(prompts, tasks, mesh, seed=0, steps=5) == first != seen(prompts, tasks, mesh, seed=1, steps=5)


@pytest.mark.parametrize("done", [1, 4, 5])
def test_it_goes_on_where_it_was_stopped(done: int, prompts: Prompts, tasks: list[Task], mesh: Mesh) -> None:
    batches, reported = seen(prompts, tasks, mesh, seed=0, steps=5)
    assert seen(prompts, tasks, mesh, seed=0, steps=5, done=done) == (batches[done:], reported[done:])


def test_every_batch_is_compiled_for_the_group_with_most_in_the_loss(
    prompts: Prompts, tasks: list[Task], mesh: Mesh
) -> None:
    groups = groups_of(tasks, 5)
    groups[3] = [Demonstration(tasks[3], (3,) * 4, (True,) * 4)] * 2
    widths: list[int] = []

    def step(state: int, parts: list[GroupBatch]) -> tuple[int, dict[str, float]]:
        widths.extend(part.loss_rows.shape[1] for part in parts)
        return state, {"loss": 1.0, "grad_norm": 2.0}

    assert len(list(finetune(step, 0, groups, 8, 1, 5, prompts, BUCKETS, mesh, seed=0))) == 5
    assert widths == [8] * 5
