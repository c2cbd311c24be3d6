"""The stream of batches: its order, its restarts, its shares among processes, its damaged rows."""

import itertools
import json
import logging
import threading
from typing import Any

import pytest
from grain.experimental import assert_equal_output_after_checkpoint

from maestro_jax.data.mixture import Mixture
from maestro_jax.data.order import merge_states
from maestro_jax.data.pipeline import Batches, BatchIterator, check_task
from maestro_jax.errors import ConfigError, DataError
from maestro_jax.types import Task
from tests.data.listed import Damaged, Listed, numbered

DAMAGED = {0, 4, 5, 10}


def ids(stream: BatchIterator[Task], batches: int | None = None) -> list[str]:
    return [task.id for batch in itertools.islice(stream, batches) for task in batch]


# ---- order -------------------------------------------------------------------------------------------------


def test_without_shuffle_the_order_is_the_source_s(tasks: Listed) -> None:
    assert [task for (task,) in Batches(tasks, 1, seed=0, shuffle=False, epochs=1)] == tasks


def test_each_epoch_holds_every_task_once_in_another_order(tasks: Listed) -> None:
    stream = iter(Batches(tasks, 11, seed=0))
    first, second = ids(stream, 1), ids(stream, 1)
    assert sorted(first) == sorted(second) == sorted(task.id for task in tasks)
    assert first != second != sorted(second)


def test_order_follows_the_seed(tasks: Listed) -> None:
    def order(seed: int) -> list[str]:
        return ids(iter(Batches(tasks, 11, seed=seed)), 1)

    assert order(1) == order(1) != order(2)


def test_order_does_not_depend_on_which_task_is_ready_first(tasks: Listed) -> None:
    """Every second task that is read waits for the one read after it."""
    began, later = itertools.count(), threading.Event()

    def late(task: Task) -> Task:
        if next(began) % 2:
            later.set()
        else:
            later.wait(0.1)
            later.clear()
        return task

    assert ids(iter(Batches(tasks, 4, late, seed=0, epochs=2))) == ids(iter(Batches(tasks, 4, seed=0, epochs=2)))


def test_batches_run_across_epochs_and_only_the_last_is_smaller(tasks: Listed) -> None:
    assert [len(batch) for batch in Batches(tasks, 4, seed=0, epochs=2)] == [4, 4, 4, 4, 4, 2]


def test_tasks_are_prepared_once_and_at_most_a_batch_ahead() -> None:
    prepared: list[str] = []

    def note(task: Task) -> Task:
        prepared.append(task.id)
        return task

    stream = iter(Batches(numbered(500), 16, note, seed=0))
    for taken in range(1, 6):
        next(stream)
        assert len(set(prepared)) == len(prepared) <= 16 * (taken + 1)


# ---- restarts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 13])
def test_restore_at_every_position_gives_the_same_remaining_batches(tasks: Listed, batch_size: int) -> None:
    assert_equal_output_after_checkpoint(Batches(tasks, batch_size, seed=3, epochs=2))


def test_restore_at_every_position_with_damaged_rows(tasks: Listed) -> None:
    assert_equal_output_after_checkpoint(Batches(Damaged(tasks, DAMAGED), 3, seed=3, epochs=2, damage_limit=4))


@pytest.mark.parametrize("index", [0, 1])
def test_restore_at_every_position_of_a_process(tasks: Listed, index: int) -> None:
    assert_equal_output_after_checkpoint(Batches(tasks, 4, seed=3, epochs=2, process_index=index, process_count=2))


def test_state_is_json_and_moves_to_another_batch_size(tasks: Listed) -> None:
    first = iter(Batches(tasks, 4, seed=0))
    next(first)
    second = iter(Batches(tasks, 2, seed=0))
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert next(second) + next(second) == next(first)


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 0, "shuffle": False}])
def test_state_of_another_stream_is_refused(tasks: Listed, other: dict) -> None:
    state = iter(Batches(tasks, 1, seed=0)).get_state()
    with pytest.raises(ConfigError, match="start in a new work directory"):
        iter(Batches(tasks, 1, **other)).set_state(state)


def test_state_of_another_data_set_is_refused(tasks: Listed) -> None:
    state = iter(Batches(tasks, 1, seed=0)).get_state()
    with pytest.raises(ConfigError, match=r"tasks=\[11\], this run has tasks=\[10\]"):
        iter(Batches(Listed(tasks[:10]), 1, seed=0)).set_state(state)


# ---- processes ---------------------------------------------------------------------------------------------


def processes(source: Listed, count: int, batch_size: int = 4, **options: Any) -> list[BatchIterator[Task]]:
    made = [Batches(source, batch_size, process_index=i, process_count=count, **options) for i in range(count)]
    return [iter(batches) for batches in made]


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_all_processes_side_by_side_are_the_batches_of_one(tasks: Listed, count: int) -> None:
    (alone,) = processes(tasks, 1, seed=5)
    together = processes(tasks, count, seed=5)
    for _ in range(7):
        assert sum((next(stream) for stream in together), ()) == next(alone)
    assert all(stream.get_state() == alone.get_state() for stream in together)


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (4, 2), (2, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("damaged", [set(), DAMAGED], ids=["sound", "damaged"])
def test_another_number_of_processes_loses_and_repeats_nothing(
    tasks: Listed, counts: tuple[int, int], damaged: set[int]
) -> None:
    """At every position of two epochs; then a third time, with the first number again."""
    # Not shuffled: Grain shuffles a handful of rows a hundred times slower than thousands.
    source, options = Damaged(tasks, damaged), {"seed": 0, "shuffle": False, "damage_limit": len(damaged)}
    order = 8 * [task.id for task in tasks]
    for first, second in itertools.product(range(7), (0, 1, 3)):
        seen: list[str] = []
        state = None
        for count, batches in ((counts[0], first), (counts[1], second), (counts[0], 2)):
            streams = processes(source, count, **options)
            for stream in streams if state else ():
                stream.set_state(state)
            seen += [name for stream in streams for name in ids(stream, batches)]
            state = json.loads(json.dumps(merge_states([stream.get_state() for stream in streams])))
        assert len(seen) == 4 * (first + second + 2)
        consumed = [order[position] for position in (*range(state["position"]), *state["beyond"])]
        assert sorted(seen) == sorted(name for name in consumed if int(name[-5:]) not in damaged)


def test_with_damaged_rows_a_process_goes_on_from_the_state_of_all(tasks: Listed) -> None:
    source = Damaged(tasks, DAMAGED)
    options: dict = {"seed": 0, "shuffle": False, "damage_limit": 4}
    streams = processes(source, 2, **options)
    wanted = [ids(stream, 20) for stream in processes(source, 2, **options)]
    for done in range(15):
        state = merge_states([stream.get_state() for stream in streams])
        for stream, alone in zip(processes(source, 2, **options), wanted, strict=True):
            stream.set_state(state)
            assert ids(stream, 5) == alone[2 * done : 2 * done + 10]
        for stream in streams:
            next(stream)


def test_states_of_different_streams_are_not_merged(tasks: Listed) -> None:
    states = [iter(Batches(tasks, 2, seed=seed)).get_state() for seed in (0, 1)]
    with pytest.raises(ConfigError, match="take those of the processes of one run"):
        merge_states(states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_count": 3}, "multiple of 3 processes, found 4"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in 0\.\.1, found 2"),
    ],
)
def test_a_wrong_number_of_processes_is_refused(tasks: Listed, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Batches(tasks, 4, seed=0, **options)


# ---- mixtures ----------------------------------------------------------------------------------------------


def mixed(weights: tuple[float, ...] = (0.7, 0.3)) -> Mixture:
    return Mixture([numbered(20, "few"), numbered(40, "many")], weights)


def test_a_mixture_draws_in_exact_shares_and_each_source_goes_through_its_epochs() -> None:
    drawn = ids(iter(Batches(mixed(), 10, seed=0)), 20)
    for start in range(0, 200, 10):
        assert sum(name.startswith("0/few/") for name in drawn[start : start + 10]) == 7
    for name, size, epochs in (("0/few", 20, 7), ("1/many", 40, 1)):
        own = [one for one in drawn if one.startswith(name)]
        for epoch in range(epochs):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size


def test_sources_of_equal_length_have_orders_of_their_own() -> None:
    both = Mixture([numbered(30, "a"), numbered(30, "b")], [1, 1])
    drawn = ids(iter(Batches(both, 60, seed=0)), 1)
    orders = [[name[-3:] for name in drawn if name.startswith(source)] for source in ("0", "1")]
    assert orders[0] != orders[1]


def test_a_mixture_goes_on_where_it_stopped() -> None:
    stream, wanted = iter(Batches(mixed(), 4, seed=3)), ids(iter(Batches(mixed(), 4, seed=3)), 12)
    for done in range(10):
        other = iter(Batches(mixed(), 2, seed=3))
        other.set_state(stream.get_state())
        assert ids(other, 4) == wanted[done * 4 : done * 4 + 8]
        next(stream)


def test_state_of_other_shares_is_refused() -> None:
    state = iter(Batches(mixed(), 1, seed=0)).get_state()
    with pytest.raises(ConfigError, match=r"weights=\[7, 3\], this run has weights=\[1, 1\]"):
        iter(Batches(mixed((2, 2)), 1, seed=0)).set_state(state)


def test_a_mixture_has_no_epochs() -> None:
    with pytest.raises(ConfigError, match="leave epochs=None"):
        Batches(mixed(), 1, seed=0, epochs=1)


# ---- damaged rows ------------------------------------------------------------------------------------------


def test_damaged_rows_are_logged_once_and_skipped(tasks: Listed, caplog: pytest.LogCaptureFixture) -> None:
    stream = iter(Batches(Damaged(tasks, {2, 7}), 1, seed=0, epochs=3, damage_limit=2))
    with caplog.at_level(logging.WARNING):
        assert len(ids(stream)) == 3 * 9
    assert stream.damaged == 2
    assert sorted(record.getMessage().split(": ", 1)[1] for record in caplog.records) == [
        "toy.parquet row 2: damaged; remove the row",
        "toy.parquet row 7: damaged; remove the row",
    ]


def test_one_damaged_row_too_many_stops_the_run(tasks: Listed) -> None:
    with pytest.raises(DataError, match="toy.parquet row .*at most 1 may be skipped"):
        ids(iter(Batches(Damaged(tasks, {2, 7}), 1, seed=0, epochs=1, damage_limit=1)))


def test_by_default_no_damage_is_tolerated(tasks: Listed) -> None:
    with pytest.raises(DataError, match="row 2: damaged"):
        ids(iter(Batches(Damaged(tasks, {2}), 1, seed=0, epochs=1)))


def test_only_damaged_rows_stop_the_run_whatever_the_limit(tasks: Listed) -> None:
    with pytest.raises(DataError, match="3 of 3 rows are damaged"):
        next(iter(Batches(Damaged(tasks[:3], {0, 1, 2}), 1, seed=0, damage_limit=100)))


def test_a_truncated_image_counts_as_damage_of_its_file_and_row(tasks: Listed) -> None:
    broken = Task("toy/broken", "what?", (tasks[0].images[0][:60],), ("1",), "toy")
    message = r"^toy.parquet row 11: task toy/broken, images\[0\]: image is damaged .*"
    with pytest.raises(DataError, match=message):
        ids(iter(Batches(Listed([*tasks, broken]), 1, seed=0, epochs=1)))


def test_a_fault_that_is_no_damage_stops_the_run_at_its_task(tasks: Listed) -> None:
    def picky(task: Task) -> Task:
        if task == tasks[3]:
            raise ConfigError("set config.policy.images_per_task=3")
        return check_task(task)

    stream = iter(Batches(tasks, 1, picky, seed=0, shuffle=False, damage_limit=10))
    assert len(ids(stream, 3)) == 3
    with pytest.raises(ConfigError, match="images_per_task"):
        next(stream)


# ---- arguments ---------------------------------------------------------------------------------------------


def test_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="holds no task"):
        Batches(Listed(), 1, seed=0)


def test_bad_batch_size_is_refused(tasks: Listed) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        Batches(tasks, 0, seed=0)


def test_bad_seed_is_refused(tasks: Listed) -> None:
    with pytest.raises(ConfigError, match="seed"):
        Batches(tasks, 1, seed=-1)
