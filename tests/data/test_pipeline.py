"""The stream of tasks: its order, its restarts, its damaged rows."""

import itertools
import json
import logging

import pytest
from grain.experimental import assert_equal_output_after_checkpoint

from maestro_jax.data.pipeline import Batches, task_iterator
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.types import Task


class DamagedSource:
    """Tasks of which some rows cannot be read."""

    def __init__(self, tasks: list[Task], damaged: set[int]):
        self.tasks, self.damaged = tasks, damaged

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        if index in self.damaged:
            raise DataError(f"toy.parquet row {index}: damaged; remove the row")
        return self.tasks[index]


def ids(stream: object, count: int) -> list[str]:
    return [task.id for task in itertools.islice(stream, count)]  # type: ignore[call-overload]


def test_without_shuffle_the_order_is_the_source_s(tasks: list[Task]) -> None:
    assert list(task_iterator(tasks, seed=0, shuffle=False, epochs=1)) == tasks


def test_each_epoch_holds_every_task_once_in_another_order(tasks: list[Task]) -> None:
    stream = task_iterator(tasks, seed=0)
    first, second = ids(stream, 11), ids(stream, 11)
    assert sorted(first) == sorted(second) == sorted(task.id for task in tasks)
    assert first != second != sorted(second)


def test_order_follows_the_seed(tasks: list[Task]) -> None:
    assert ids(task_iterator(tasks, seed=1), 11) == ids(task_iterator(tasks, seed=1), 11)
    assert ids(task_iterator(tasks, seed=1), 11) != ids(task_iterator(tasks, seed=2), 11)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 13])
def test_restore_at_every_position_gives_the_same_remaining_batches(tasks: list[Task], batch_size: int) -> None:
    assert_equal_output_after_checkpoint(Batches(tasks, batch_size, seed=3, epochs=2))


def test_restore_at_every_position_with_damaged_rows(tasks: list[Task]) -> None:
    source = DamagedSource(tasks, {0, 4, 5, 10})
    assert_equal_output_after_checkpoint(Batches(source, 3, seed=3, epochs=2, damage_limit=4))


def test_batches_run_across_epochs_and_only_the_last_is_smaller(tasks: list[Task]) -> None:
    assert [len(batch) for batch in Batches(tasks, 4, seed=0, epochs=2)] == [4, 4, 4, 4, 4, 2]


def test_state_is_json_and_moves_to_another_batch_size(tasks: list[Task]) -> None:
    first = iter(Batches(tasks, 4, seed=0))
    next(first)
    second = iter(Batches(tasks, 2, seed=0))
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert next(second) + next(second) == next(first)


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 0, "shuffle": False}])
def test_state_of_another_stream_is_refused(tasks: list[Task], other: dict) -> None:
    state = task_iterator(tasks, seed=0).get_state()
    with pytest.raises(ConfigError, match="start in a new work directory"):
        task_iterator(tasks, **other).set_state(state)


def test_state_of_another_data_set_is_refused(tasks: list[Task]) -> None:
    state = task_iterator(tasks, seed=0).get_state()
    with pytest.raises(ConfigError, match="tasks=11, this run has tasks=10"):
        task_iterator(tasks[:10], seed=0).set_state(state)


def test_damaged_rows_are_logged_once_and_skipped(tasks: list[Task], caplog: pytest.LogCaptureFixture) -> None:
    stream = task_iterator(DamagedSource(tasks, {2, 7}), seed=0, epochs=3, damage_limit=2)
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 3 * 9
    assert stream.damaged == 2
    assert sorted(record.args[2].args[0] for record in caplog.records) == [  # type: ignore[union-attr,index]
        "toy.parquet row 2: damaged; remove the row",
        "toy.parquet row 7: damaged; remove the row",
    ]


def test_one_damaged_row_too_many_stops_the_run(tasks: list[Task]) -> None:
    with pytest.raises(DataError, match="toy.parquet row .*at most 1 may be skipped"):
        list(task_iterator(DamagedSource(tasks, {2, 7}), seed=0, epochs=1, damage_limit=1))


def test_by_default_no_damage_is_tolerated(tasks: list[Task]) -> None:
    with pytest.raises(DataError, match="row 2: damaged"):
        list(task_iterator(DamagedSource(tasks, {2}), seed=0, epochs=1))


def test_only_damaged_rows_stop_the_run_whatever_the_limit(tasks: list[Task]) -> None:
    with pytest.raises(DataError, match="3 of 3 rows are damaged"):
        next(task_iterator(DamagedSource(tasks[:3], {0, 1, 2}), seed=0, damage_limit=100))


def test_truncated_image_counts_as_damage(tasks: list[Task]) -> None:
    broken = Task("toy/broken", "what?", (tasks[0].images[0][:60],), ("1",), "toy")
    with pytest.raises(DataError, match=r"task toy/broken, images\[0\]: image is damaged"):
        list(task_iterator([*tasks, broken], seed=0, epochs=1))


def test_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="holds no task"):
        task_iterator([], seed=0)


def test_bad_batch_size_is_refused(tasks: list[Task]) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        Batches(tasks, 0, seed=0)


def test_bad_seed_is_refused(tasks: list[Task]) -> None:
    with pytest.raises(ConfigError, match="seed"):
        task_iterator(tasks, seed=-1)
