"""Further tasks in the place of groups without contrast: which are taken, that none is lost, how a run goes on."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from maestro_jax.data.pipeline import Batches
from maestro_jax.data.source import TaskSource
from maestro_jax.errors import ConfigError
from maestro_jax.parallel import cluster
from maestro_jax.policy.prompts import PreparedTask
from maestro_jax.policy.tokens import Tokens
from maestro_jax.registry.dispatch import Dispatcher
from maestro_jax.rollout.engine import Rollout
from maestro_jax.rollout.outages import Outages
from maestro_jax.rollout.supply import Supply, SupplyConfig
from maestro_jax.rollout.trajectory import GroupRecord, Trajectory
from maestro_jax.types import Task
from tests.data.listed import Listed
from tests.parallel import processes
from tests.rollout import refill_worker, toy
from tests.rollout.test_engine import Runner, assert_same_arrays, bigram_runner, one_device
from tests.rollout.test_processes import launch, wait_for_all
from tests.rollout.test_supply import Numbered, SlowForSome, until_back

GROUPS, MEMBERS, TASKS = 4, 2, 30

# ---- which tasks a step takes: an engine whose episodes are over at once -------------------------------------


def tasks() -> TaskSource:
    return Listed([Task(f"{n:02d}", f"question {n}", (), ("7",), "toy") for n in range(TASKS)])


class Instant:
    """An engine and its session; an episode is one token, its member's random key."""

    def __init__(self) -> None:
        self.mesh, self.config = one_device(), SimpleNamespace(room=4)
        self.exchange = SimpleNamespace(calls_under_way=0)
        self.prompts = SimpleNamespace(collate=self._collate)
        self.log: list[Any] = []  # what every process must do alike

    def _collate(self, prepared: Sequence[PreparedTask], agree: Callable[[Sequence[int]], Sequence[int]]) -> Any:
        (width,) = agree([max(int(one.task.id) for one in prepared)])
        self.log.append(width)
        return SimpleNamespace(tokens=np.zeros((len(prepared), width)), ids=[one.task.id for one in prepared])

    def session(self, params: object, groups: int, members: int, prefix: int, greedy: bool) -> "Instant":
        self.log.append((groups, members, prefix))
        return self

    def submit(
        self, tasks: Sequence[Task], prompts: object, keys: Sequence[Sequence[np.ndarray]], batch: int
    ) -> list[GroupRecord]:
        assert len(tasks) <= batch <= GROUPS
        return [
            GroupRecord(task, n, [Trajectory(task, m, key=key) for m, key in enumerate(own)])
            for n, (task, own) in enumerate(zip(tasks, keys, strict=True))
        ]

    def run(self, params: object, version: int) -> Iterator[None]:
        yield None


def flat(*numbers: int) -> Callable[[Rollout], np.ndarray]:
    """No contrast in the groups of these tasks."""
    return lambda rollout: np.array([int(group[0].task.id) not in numbers for group in rollout.trajectories], bool)


def supply(
    contrast: Callable[[Rollout], np.ndarray], refill: int = 2, shuffle: bool = False, process: int = 0, of: int = 1
) -> Supply:
    batches = Batches(
        tasks(),
        GROUPS,
        lambda task: PreparedTask(task, ()),
        seed=0,
        shuffle=shuffle,
        process_index=process,
        process_count=of,
    )
    return Supply(Instant(), iter(batches), SupplyConfig(GROUPS, MEMBERS, 1, 0, 0, refill), 0, None, contrast)  # type: ignore[arg-type]


def numbers(groups: Sequence[Sequence[Trajectory]] | None) -> list[int]:
    return [int(group[0].task.id) for group in groups or ()]


def step(source: Supply, number: int) -> tuple[list[int], list[int]]:
    """Tasks that are trained, and those that were replaced."""
    (rollout,) = source.step(None, number)  # type: ignore[arg-type]
    assert rollout.prompts.ids == [group[0].task.id for group in rollout.trajectories]  # type: ignore[attr-defined]
    return numbers(rollout.trajectories), numbers(rollout.replaced)


def test_the_next_tasks_take_the_place_of_those_without_contrast() -> None:
    source = supply(flat(1, 2, 5, 6))
    assert step(source, 1) == ([0, 3, 4, 7], [1, 2, 5, 6])
    assert step(source, 2) == ([8, 9, 10, 11], [])


def test_what_a_step_leaves_of_a_batch_is_the_next_ones() -> None:
    source = supply(flat(0, 9))
    assert [step(source, number) for number in (1, 2)] == [([1, 2, 3, 4], [0]), ([5, 6, 7, 8], [])]
    assert step(source, 3) == ([10, 11, 12, 13], [9])


def test_where_the_cap_is_met_the_first_groups_stay() -> None:
    source = supply(flat(*range(5), *range(6, 12)), refill=1)
    (rollout,) = source.step(None, 1)  # type: ignore[arg-type]
    assert (numbers(rollout.trajectories), numbers(rollout.replaced)) == ([0, 1, 2, 5], [3, 4, 6, 7])
    assert rollout.refilled == 1
    assert step(source, 2)[0] == [12, 13, 14, 15]


def test_keys_are_those_of_the_batch_that_a_task_was_pulled_with() -> None:
    """Whichever step it is run in: two passes over few tasks may meet in one step."""
    source = supply(flat(0))
    (rollout,) = source.step(None, 1)  # type: ignore[arg-type]
    last = rollout.trajectories[-1][0]
    assert last.key.tolist() == source._keys([last.task], 2)[0][0].tolist()


RANDOM = np.random.default_rng(0)
FLAT = flat(*RANDOM.choice(TASKS, TASKS // 3, replace=False).tolist())
STEPS = 12  # more than two passes


def test_every_task_is_trained_or_replaced_once_in_the_order_of_the_data() -> None:
    source, taken = supply(FLAT, shuffle=True), list[int]()
    for number in range(1, STEPS + 1):
        trained, replaced = step(source, number)
        assert trained and len(trained) == GROUPS
        taken += [*trained, *replaced]
    wanted = [int(one.task.id) for _, batch in zip(range(20), plain(), strict=False) for one in batch]
    assert len(taken) > 2 * TASKS and sorted(taken) == sorted(wanted[: len(taken)])


def plain() -> Iterator[Sequence[PreparedTask]]:
    return iter(Batches(tasks(), GROUPS, lambda task: PreparedTask(task, ()), seed=0))


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_goes_on_after_every_step_as_if_nothing_had_been(stop: int) -> None:
    unbroken = supply(FLAT, shuffle=True)
    wanted = [step(unbroken, number) for number in range(1, STEPS + 1)]
    before = supply(FLAT, shuffle=True)
    found = [step(before, number) for number in range(1, stop + 1)]
    after = supply(FLAT, shuffle=True)
    after.set_state(json.loads(json.dumps(before.get_state())))
    found += [step(after, number) for number in range(stop + 1, STEPS + 1)]
    assert found == wanted and after.get_state() == unbroken.get_state()


# ---- two processes -----------------------------------------------------------------------------------------


class Two:
    """Two processes as threads that exchange what they tell each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.local, self.barrier, self.told = threading.local(), threading.Barrier(2, timeout=60), [None, None]
        monkeypatch.setattr(cluster, "gather", self.gather)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: self.local.number)

    def gather(self, value: Any) -> list[Any]:
        self.told[self.local.number] = json.loads(json.dumps(value))
        self.barrier.wait()
        told = list(self.told)
        self.barrier.wait()
        return told

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None, None]

        def one(number: int) -> None:
            self.local.number = number
            try:
                results[number] = work(number)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_two_processes_replace_their_own_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(monkeypatch)

    def work(process: int) -> Any:
        source = supply(FLAT, shuffle=True, process=process, of=2)
        steps = [step(source, number) for number in range(1, 5)]
        state = source.get_state()
        again = supply(FLAT, shuffle=True, process=process, of=2)
        again.set_state(state)
        more = [step(again, number) for number in range(5, 9)]
        assert [step(source, number) for number in range(5, 9)] == more
        return steps + more, state, source.engine.log  # type: ignore[attr-defined]

    (first, state, log), (second, other_state, other_log) = two.run(work)
    assert state == other_state and log == other_log
    taken = [n for trained, replaced in first + second for n in (*trained, *replaced)]
    assert all(len(trained) == GROUPS // 2 for trained, _ in first + second)
    assert [r for _, r in first] != [r for _, r in second]  # they needed different numbers
    counts = np.bincount(taken, minlength=TASKS)
    assert counts.max() - counts.min() <= 2  # a process may be a batch ahead of the other


def test_real_processes_run_rounds_together_where_one_has_nothing_to_run(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    toy.make_tokens(tokens)
    address = processes.free_address()
    results, logs = ([tmp_path / f"{number}.{kind}" for number in range(2)] for kind in ("json", "log"))
    with contextlib.ExitStack() as started:
        running = []
        for number in range(2):
            arguments = [tokens, address, 2, number, results[number]]
            running.append(launch(arguments, logs[number], refill_worker.__name__))
            started.callback(running[-1].kill)
        assert wait_for_all(running), "\n".join(log.read_text() for log in logs)
    (first, state), (second, other_state) = (json.loads(result.read_text()) for result in results)
    named = [[[f"toy/{n:03d}" for n in group] for group in step] for step in ([[1, 5], [0, 4]], [[8, 9], []])]
    assert first == named and state == other_state and state["done"] == {"3": [0, 1]}
    assert second == [[["toy/002", "toy/003"], []], [["toy/006", "toy/007"], []]]


def test_what_is_left_of_a_batch_is_bound_to_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    source = supply(flat(0))
    step(source, 1)
    state = source.get_state()
    assert state["done"]["2"] == [0]
    with pytest.raises(ConfigError, match="in the middle of a batch of tasks, on 2 processes"):
        supply(flat(0)).set_state(state | {"layout": [2, 1]})


# ---- with real episodes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts() -> SlowForSome:
    return SlowForSome(0.2, "many 1?")


@pytest.fixture(scope="module")
def runner(toy_tokens: Tokens, experts: SlowForSome) -> Iterator[Runner]:
    made = bigram_runner(toy_tokens, one_device(), experts)
    yield made
    made.dispatcher.close()


def talking(
    runner: Runner, contrast: Callable[[Rollout], np.ndarray], refill: int = 2, outages: Outages | None = None
) -> Supply:
    batches = Numbered(runner.engine.prompts)  # of two
    return Supply(runner.engine, batches, SupplyConfig(2, 4, 1, 0, 0, refill), 0, outages, contrast)


def but_the_first(rollout: Rollout) -> np.ndarray:
    """Stands for rewards: the first task has no contrast."""
    names = [group[0].task.id for group in rollout.trajectories]
    return np.array([name != toy.task(0).id for name in names])


def test_where_all_have_contrast_a_step_is_what_it_is_without(runner: Runner) -> None:
    (wanted,) = talking(runner, but_the_first, refill=0).step(runner.params, 1)
    (found,) = talking(runner, lambda rollout: np.ones(2, bool)).step(runner.params, 1)
    assert_same_arrays(found, wanted)
    assert wanted.replaced is None and found.replaced == [] and found.refilled == 0
    for name in ("tokens", "mask", "positions", "last"):
        np.testing.assert_array_equal(getattr(found.prompts, name), getattr(wanted.prompts, name))


def test_who_answers_first_changes_nothing(runner: Runner) -> None:
    (found,) = talking(runner, but_the_first).step(runner.params, 1)
    assert [group[0].task.id for group in found.trajectories] == ["toy/001", "toy/002"]
    assert [group[0].task.id for group in found.replaced or ()] == ["toy/000"]
    exchange = runner.engine.exchange
    slow = exchange.dispatcher = Dispatcher(SlowForSome(0.2, "many 2?"))
    try:
        (again,) = talking(runner, but_the_first).step(runner.params, 1)
    finally:
        exchange.dispatcher = runner.dispatcher
        slow.close()
    assert_same_arrays(again, found)


def test_a_further_task_that_meets_an_outage_is_run_again(runner: Runner, experts: SlowForSome) -> None:
    (wanted,) = talking(runner, but_the_first).step(runner.params, 1)
    outages, lines = until_back(experts, "many 2?")
    source = talking(runner, but_the_first, outages=outages)
    (found,) = source.step(runner.params, 1)
    assert_same_arrays(found, wanted)
    assert len(lines) == 1 and not any(t.marked for group in found.trajectories for t in group)


def test_the_share_of_marked_episodes_is_that_of_the_step(runner: Runner, experts: SlowForSome) -> None:
    """All four episodes of the further task may be marked where a third of the step's may be: nobody waits."""
    outages, lines = until_back(experts, "many 2?", max_marked=0.4)
    (found,) = talking(runner, but_the_first, outages=outages).step(runner.params, 1)
    experts.out = ""
    assert not lines and any(t.marked for t in found.trajectories[1])
