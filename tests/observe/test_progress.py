"""Progress: plain lines in logs, a moving display on terminals."""

import io

import pytest

from maestro_jax.observe import progress as module
from maestro_jax.observe.progress import Progress


def test_one_plain_line_per_update() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.phase("train", total=100)
        progress.update(7, {"reward": 0.51234, "calls": 1.0, "seconds": 12.345, "loss": None})
    first = stream.getvalue().splitlines()[0]
    assert first.startswith("train   7/100  reward 0.512  calls 1.000  seconds 12.3")
    assert "loss" not in first


def test_plain_output_is_ascii() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.phase("warm start", total=2)
        for step in (1, 2):
            progress.update(step, {"reward": 0.1 * step})
        progress.note("saved")
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "left"), [(0.5, "left 29s"), (90.0, "left 1h27m"), (4000.0, "42/100")])
def test_time_left_follows_the_pace_without_the_first_step(
    monkeypatch: pytest.MonkeyPatch, seconds: float, left: str
) -> None:
    """The first step compiles. Nothing is known of steps that take more than an hour."""
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(stream) as progress:
        progress.phase("train", total=100, done=40)
        now[0] = 300.0
        progress.update(41)
        now[0] += seconds
        progress.update(42)
    first, second, last = stream.getvalue().splitlines()
    assert first == "train  41/100" and second.endswith(left)
    assert last.startswith("train: 42/100 in ")


def test_phases_without_steps_and_names_with_brackets_are_shown() -> None:
    stream = io.StringIO()
    with Progress(stream, terminal=True) as progress:
        progress.phase("install [all] into /tmp", total=0)
        progress.update(0, {"package": "[red]"})
        progress._live.refresh()
    assert "install [all] into /tmp" in stream.getvalue() and "package [red]" in stream.getvalue()


def test_last_step_has_nothing_left() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.phase("train", total=1)
        progress.update(1)
    assert "left" not in stream.getvalue()


def test_ticks_print_nothing() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.phase("suite", total=9)
        progress.tick(5)
        assert stream.getvalue() == ""


def test_each_phase_ends_with_a_line() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for name in ("suite", "train"):
            progress.phase(name, total=3)
            progress.tick(3)
    assert [line.rsplit(" in ")[0] for line in stream.getvalue().splitlines()] == ["suite: 3/3", "train: 3/3"]


def test_phase_line_comes_also_after_an_error() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress(stream) as progress:
        progress.phase("train", total=3)
        raise KeyError
    assert stream.getvalue().startswith("train: 0/3 in ")


def test_terminal_shows_bar_figures_and_curve() -> None:
    stream = io.StringIO()
    with Progress(stream, terminal=True) as progress:
        progress.phase("train", total=10)
        for step in (1, 2, 3):
            progress.update(step, {"reward": step / 10, "accuracy": 0.6})
        progress.note("[saved] step 3")
        progress._live.refresh()
    shown = stream.getvalue()
    for part in ("train", "3/10", "accuracy 0.600", "▁▅█", "[saved] step 3"):
        assert part in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2s"), (9.96, "10.0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (7265, "2h01m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert module._duration(seconds) == text


def test_small_curve_of_equal_values() -> None:
    assert module._sparkline([2.0, 2.0]) == "▁▁"
