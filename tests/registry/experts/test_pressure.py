"""Back-pressure: the window, the hold, and which refusals are failures. Time is the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.registry.experts.pressure import QUIET_SECONDS, Pressure
from maestro_jax.registry.experts.retries import RetryConfig
from tests.registry.experts.test_breaker import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, concurrency: int = 64) -> Pressure:
    return Pressure(concurrency, RetryConfig(), clock, draw=lambda: 0.5)


def fill_up(pressure: Pressure) -> int:
    """Begins as many attempts as have room; how many run then."""
    while pressure.has_room:
        pressure.running += 1
    return pressure.running


def refuse(pressure: Pressure, count: int, retry_after: float = 1.0) -> list[bool]:
    """So many attempts of this round are refused; which of the refusals are failures."""
    began, found = pressure.rounds, []
    for _ in range(count):
        found.append(pressure.refused(began, retry_after))
        pressure.running -= 1
    return found


def test_a_window_is_what_the_server_was_serving(clock: Clock) -> None:
    pressure = make(clock)
    assert fill_up(pressure) == 64
    assert refuse(pressure, 60) == [False] * 60
    clock.now = 3.0
    assert fill_up(pressure) == 4


def test_it_is_left_alone_as_long_as_it_says(clock: Clock) -> None:
    pressure = make(clock)
    pressure.running = 1
    refuse(pressure, 1, retry_after=7.0)
    clock.now = 6.9
    assert not pressure.has_room
    clock.now = 7.0
    assert pressure.has_room


def test_without_a_time_the_hold_is_that_of_retries_and_doubles(clock: Clock) -> None:
    pressure, holds = make(clock), []
    for _ in range(4):
        clock.now = pressure.held_until
        pressure.running = 1
        refuse(pressure, 1, retry_after=0.0)
        holds.append(pressure.held_until - clock.now)
    assert holds == [0.25, 0.5, 1.0, 2.0]


def test_a_window_doubles_after_each_quiet_while(clock: Clock) -> None:
    pressure = make(clock, concurrency=10)
    pressure.running = 3
    refuse(pressure, 1)
    windows = []
    for _ in range(4):
        pressure.running = 0
        clock.now = max(clock.now, pressure.held_until)
        windows.append(fill_up(pressure))
        clock.now += QUIET_SECONDS
    assert windows == [2, 4, 8, 10]


def test_a_round_is_a_failure_once_if_nobody_was_served_since_the_last(clock: Clock) -> None:
    pressure = make(clock)
    pressure.running = 9
    assert refuse(pressure, 3) == [False, False, False]
    assert refuse(pressure, 3) == [True, False, False]
    pressure.served()
    assert refuse(pressure, 3) == [False, False, False]


@given(st.lists(st.tuples(st.sampled_from(["begin", "serve", "refuse", "wait"]), st.floats(0.0, 40.0))))
def test_one_attempt_always_gets_through_in_the_end(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    pressure, rounds = make(clock, concurrency=3), []
    for step, seconds in steps:
        if step == "begin" and pressure.has_room:
            rounds.append(pressure.rounds)
            pressure.running += 1
        elif step == "wait":
            clock.now += seconds
        elif step != "begin" and rounds:
            if step == "serve":
                pressure.served()
            else:
                pressure.refused(rounds[0], seconds)
            rounds.pop(0)
            pressure.running -= 1
        assert 0 <= pressure.running == len(rounds) <= 3
    pressure.running = 0
    clock.now += 30.0
    assert pressure.has_room
