"""Waiting before a retry, and the budget that pays for it."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.registry.experts.retries import RetryBudget, RetryConfig, parse_retry_after

NOW = datetime.datetime(2026, 1, 1, 12, 0, 0, tzinfo=datetime.UTC)
CONFIG = RetryConfig()


def test_jitter_is_full_and_its_range_doubles_up_to_a_cap() -> None:
    assert [CONFIG.wait(n, 0.0, lambda: 1.0) for n in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert CONFIG.wait(3, 0.0, lambda: 0.25) == 0.5
    assert CONFIG.wait(3, 0.0, lambda: 0.0) == 0.0


def test_retry_after_is_the_least_wait_up_to_its_cap() -> None:
    assert CONFIG.wait(1, 7.0, lambda: 1.0) == 7.0
    assert CONFIG.wait(1, 0.1, lambda: 1.0) == 0.5
    assert CONFIG.wait(1, 3600.0, lambda: 1.0) == 30.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("0.25", 0.25),  # no RFC has it, but servers do
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 12:00:30 -0000", 0.0),  # a date without a zone
        ("", 0.0),
        ("-5", 0.0),
        ("1e9", 0.0),
        ("nan", 0.0),
        ("9" * 400, 0.0),
        ("٣", 0.0),
        ("soon", 0.0),
        ("Thu, 99 Jan 2026 12:00:30 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float) -> None:
    assert parse_retry_after(header, NOW) == seconds


@given(st.text())
def test_any_header_gives_seconds(header: str) -> None:
    assert parse_retry_after(header, NOW) >= 0.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(0.0, 5.0))))
def test_retries_never_exceed_a_tenth_of_requests_and_three_a_second(steps: list[tuple[int, int, float]]) -> None:
    now = 100.0
    budget = RetryBudget(lambda: now)
    offered = retried = 0
    for offers, takes, seconds in steps:
        for _ in range(offers):
            budget.offer()
        offered += offers
        now += seconds
        retried += sum(budget.take() for _ in range(takes))
        assert retried <= 0.10 * offered + 3 * (now - 100.0) + 1e-6


def test_what_is_saved_up_is_capped() -> None:
    now = 0.0
    budget = RetryBudget(lambda: now)
    now = 1e6
    assert sum(budget.take() for _ in range(1000)) == 100
