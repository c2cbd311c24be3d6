"""The closing table fits a terminal and says what was measured."""

from typing import Any

import pytest

from maestro_jax.observe.table import ROWS, WIDTH, summary_table

NAMES = [name for name, _ in ROWS]


def summary(domains: int) -> dict[str, Any]:
    return {
        "accuracy": dict(zip(NAMES, (0.14, 0.36, 0.38, 0.84, 0.88, 0.94), strict=True)),
        "accuracy_by_domain": {name: {f"domain_number_{at}": 1.0 for at in range(domains)} for name in NAMES},
        "steps": 80,
        "wall_seconds": 521.3,
        "seed": 0,
        "held_out_tasks": 250,
    }


@pytest.mark.parametrize("domains", [0, 1, 5, 14])
def test_fits_the_terminal_in_ascii(domains: int) -> None:
    table = summary_table(summary(domains))
    assert max(len(line) for line in table.splitlines()) <= WIDTH
    assert table.isascii()


def test_says_what_the_figures_leave_out() -> None:
    gaps = {"missing": {"warm_start": 12, "trained": 0, "baselines": 30}, "marked": {"Chart-Lens": 0.043}}
    table = summary_table(summary(2) | gaps)
    assert "warm start (before RL): 12 of 250 tasks not answered; accuracy over the others\n" in table
    assert "baselines: 30 calls not answered" in table and "trained (after RL): " not in table
    assert "Chart-Lens failed 4.3 % of the training episodes at first" in table
    assert max(len(line) for line in table.splitlines()) <= WIDTH


def test_says_everything_once() -> None:
    table = summary_table(summary(2))
    for part in (
        "random routing",
        "14.0",
        "trained (after RL)",
        "84.0",
        "80 steps, 8 min 41 s, seed 0",
        "250 held-out",
    ):
        assert table.count(part) == 1
    assert "gained +46.0 points" in table
    assert "reaches 0.95 of the domain oracle" in table


def test_every_domain_is_shown_when_they_do_not_fit_side_by_side() -> None:
    many = summary(0)
    many["accuracy_by_domain"] = {"trained": {f"d{at}": at / 100 for at in range(14)}}
    table = summary_table(many)
    assert all(f" d{at}" in table for at in range(14)) and " 13.0" in table


def test_what_was_not_measured_is_a_dash() -> None:
    short = summary(1)
    short["accuracy_by_domain"] = {"trained": {"charts": 0.5}}
    random_line = next(line for line in summary_table(short).splitlines() if line.startswith("| random"))
    assert random_line.endswith(" - |")


def test_rows_that_are_missing_are_left_out() -> None:
    short = summary(1)
    short["accuracy"] = {"trained": 0.5}
    table = summary_table(short)
    assert "random routing" not in table and "50.0" in table
