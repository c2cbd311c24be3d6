"""The breaker: when it opens, for how long, and that a probe decides. Time is the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.registry.experts.breaker import Breaker, BreakerConfig, BreakerState

CONFIG = BreakerConfig()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(CONFIG, clock)


def attempt(breaker: Breaker, good: bool) -> bool:
    """Whether it was let through."""
    permit = breaker.acquire()
    if permit is None:
        return False
    (breaker.succeeded if good else breaker.failed)(permit)
    return True


def probe(breaker: Breaker, good: bool) -> bool:
    """Whether one was let out."""
    permit = breaker.probe()
    if permit is None:
        return False
    (breaker.succeeded if good else breaker.failed)(permit)
    return True


def open_up(breaker: Breaker) -> None:
    for _ in range(CONFIG.in_a_row):
        assert attempt(breaker, good=False)
    assert breaker.state is BreakerState.OPEN


def test_five_failures_in_a_row_open_it(breaker: Breaker) -> None:
    open_up(breaker)
    assert not breaker.admits and breaker.acquire() is None


def test_a_success_in_between_keeps_it_closed(breaker: Breaker) -> None:
    for _ in range(3):
        for good in (False, False, False, False, True):
            attempt(breaker, good)
        assert breaker.state is BreakerState.CLOSED


def test_half_of_twenty_open_it(breaker: Breaker) -> None:
    for _ in range(9):
        attempt(breaker, good=True)
        attempt(breaker, good=False)
    attempt(breaker, good=True)
    assert breaker.state is BreakerState.CLOSED
    attempt(breaker, good=False)
    assert breaker.state is BreakerState.OPEN


def test_only_the_latest_thirty_seconds_count(breaker: Breaker, clock: Clock) -> None:
    for _ in range(9):
        attempt(breaker, good=False)
        attempt(breaker, good=True)
    clock.now = 31.0
    attempt(breaker, good=True)
    attempt(breaker, good=False)
    assert breaker.state is BreakerState.CLOSED


def test_it_stays_open_twice_as_long_after_each_failed_probe_up_to_half_a_minute(
    breaker: Breaker, clock: Clock
) -> None:
    open_up(breaker)
    waits = []
    for _ in range(6):
        waits.append(breaker.probe_in)
        clock.now += breaker.probe_in - 0.5
        assert breaker.probe() is None
        clock.now += 0.5
        assert not breaker.admits  # no request finds out that it is still dead
        assert probe(breaker, good=False)
    assert waits == [5, 10, 20, 30, 30, 30]


def test_one_probe_at_a_time_and_its_success_closes_it(breaker: Breaker, clock: Clock) -> None:
    open_up(breaker)
    clock.now = 5.0
    permit = breaker.probe()
    assert permit is not None and breaker.probe() is None and not breaker.admits
    breaker.succeeded(permit)
    assert breaker.state is BreakerState.CLOSED and breaker.probe() is None
    assert attempt(breaker, good=True)
    open_up(breaker)
    assert breaker.probe_in == 5.0  # again, not ten


def test_what_a_probe_says_the_next_request_has_to_confirm(breaker: Breaker, clock: Clock) -> None:
    """A server that can do a probe and no request must not get five of them every time."""
    open_up(breaker)
    for seconds in (10.0, 20.0, 30.0):
        clock.now += breaker.probe_in
        assert probe(breaker, good=True) and breaker.state is BreakerState.CLOSED
        assert attempt(breaker, good=False) and breaker.state is BreakerState.OPEN
        assert breaker.probe_in == seconds


def test_a_probe_that_is_answered_with_a_fault_leaves_it_to_one_request(breaker: Breaker, clock: Clock) -> None:
    open_up(breaker)
    clock.now = 5.0
    permit = breaker.probe()
    assert permit is not None
    breaker.faulted(permit)
    assert breaker.state is BreakerState.HALF_OPEN and breaker.probe_in == 10.0
    decides = breaker.acquire()
    assert decides is not None and breaker.acquire() is None
    breaker.abandoned(decides)
    assert attempt(breaker, good=True) and breaker.state is BreakerState.CLOSED


def test_an_abandoned_probe_lets_another_one_out(breaker: Breaker, clock: Clock) -> None:
    open_up(breaker)
    clock.now = 5.0
    permit = breaker.probe()
    assert permit is not None
    breaker.abandoned(permit)
    assert probe(breaker, good=True)
    assert breaker.state is BreakerState.CLOSED


def test_attempts_begun_before_it_opened_say_nothing(breaker: Breaker, clock: Clock) -> None:
    early = [breaker.acquire() for _ in range(3)]
    open_up(breaker)
    good, bad, left = early
    assert good and bad and left
    breaker.succeeded(good)
    breaker.failed(bad)
    breaker.abandoned(left)
    assert breaker.state is BreakerState.OPEN and breaker.probe_in == 5.0


def test_changes_are_kept_with_their_times(breaker: Breaker, clock: Clock) -> None:
    clock.now = 1.0
    open_up(breaker)
    clock.now = 7.0
    probe(breaker, good=True)
    opened, probing, closed = BreakerState.OPEN, BreakerState.PROBING, BreakerState.CLOSED
    assert list(breaker.changes) == [(1.0, opened), (7.0, probing), (7.0, closed)]


STEPS = st.lists(
    st.tuples(st.sampled_from(["good", "bad", "fault", "leave", "begin", "probe"]), st.floats(0, 40)), max_size=200
)


@given(STEPS)
def test_whatever_happens_at_most_one_probe_is_out(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    breaker = Breaker(CONFIG, clock)
    out = []
    for what, seconds in steps:
        clock.now += seconds
        if what in ("begin", "probe") or not out:
            was_closed = breaker.state is BreakerState.CLOSED
            if (permit := breaker.probe() if what == "probe" else breaker.acquire()) is not None:
                out.append(permit)
                assert was_closed or sum(p.epoch == permit.epoch for p in out) == 1
        else:
            permit = out.pop(0)
            ends = {"good": breaker.succeeded, "bad": breaker.failed, "leave": breaker.abandoned}
            (breaker.faulted if what == "fault" and permit.is_probe else ends.get(what, breaker.failed))(permit)
    # It never closes itself up for good.
    clock.now += CONFIG.longest
    for permit in out:
        breaker.abandoned(permit)
    assert breaker.state is BreakerState.CLOSED or breaker.probe() is not None
