"""Figures are drawn from any plausible run: what they say is checked here, how they look by eye."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from maestro_jax.observe import figures

EXPERTS = ("Glyph-Reader", "Chart-Lens")
SKILLS = ("Chart_Problem_Solver", "OCR_Problem_Solver")
PAIRS = [(expert, skill) for expert in EXPERTS for skill in SKILLS]
COUNTS: figures.Routing = {"charts": {pair: 2 for pair in PAIRS}, "reading": {PAIRS[0]: 3, PAIRS[1]: 1}}


def is_drawn(path: pathlib.Path) -> bool:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return pixels.shape[0] > 300 and pixels.std() > 5


def test_curves(tmp_path: pathlib.Path) -> None:
    rows: list[dict] = [{"step": step, "reward": 0.1 * step, "accuracy": 0.1 * step} for step in range(10)]
    rows += [{"step": 5, "held_out_accuracy": 0.6}, {"step": 6, "reward": None}]
    figures.plot_curves(rows, {"random": 0.1, "domain_oracle": 0.9, "of my own": 0.91}, tmp_path / "a.png")
    assert is_drawn(tmp_path / "a.png")


@pytest.mark.parametrize("rows", [[], [{"step": 0, "reward": -1.0}], [{"step": 3, "held_out_accuracy": 1.0}]])
def test_curves_of_a_run_that_has_hardly_begun(tmp_path: pathlib.Path, rows: list) -> None:
    figures.plot_curves(rows, {}, tmp_path / "a.png")
    assert is_drawn(tmp_path / "a.png")


@pytest.mark.parametrize("accuracy", [None, {"charts": {PAIRS[3]: 0.9, PAIRS[0]: 0.1}, "reading": {}}])
def test_routing(tmp_path: pathlib.Path, accuracy: figures.Routing | None) -> None:
    figures.plot_routing({"before": COUNTS, "after": {"charts": {PAIRS[3]: 4}}}, tmp_path / "a.png", accuracy)
    assert is_drawn(tmp_path / "a.png")


def test_routing_of_a_policy_that_never_calls(tmp_path: pathlib.Path) -> None:
    figures.plot_routing({"before": {"charts": {}}}, tmp_path / "a.png")
    assert is_drawn(tmp_path / "a.png")


def test_pairs_are_grouped_by_expert() -> None:
    routing = {"a": {("y", "s"): 1, ("x", "t"): 1}, "b": {("y", "t"): 1, ("x", "s"): 1}}
    assert figures._pairs([routing]) == [("y", "s"), ("y", "t"), ("x", "s"), ("x", "t")]


def test_shares_add_up_in_each_domain() -> None:
    shares = figures._shares(COUNTS, ["charts", "reading", "unseen"], PAIRS)
    np.testing.assert_allclose(shares[:, :2], [[0.25, 0.75], [0.25, 0.25], [0.25, 0], [0.25, 0]])
    assert np.isnan(shares[:, 2]).all()


def test_best_pairs_may_tie_and_need_a_right_answer() -> None:
    assert figures._best_pairs({PAIRS[0]: 0.5, PAIRS[1]: 0.5, PAIRS[2]: 0.4}) == set(PAIRS[:2])
    assert figures._best_pairs({PAIRS[0]: 0.0}) == set()


def test_share_of_calls_to_a_best_pair() -> None:
    best = {"charts": {PAIRS[0]}, "reading": {PAIRS[0]}}
    assert figures._share_of_best(COUNTS, best) == pytest.approx(5 / 12)


def test_labels_are_spread_without_leaving_the_axes() -> None:
    heights = figures._spread([0.1, 0.9, 0.95, 0.96], gap=0.06, top=1.0)
    assert heights[0] == 0.1 and heights[-1] <= 1.0
    assert min(np.diff(heights)) >= 0.06 - 1e-9


def test_running_mean_is_centred_and_keeps_length() -> None:
    np.testing.assert_allclose(figures._running_mean([0.0, 3.0, 0.0]), [1.5, 1.0, 1.5])
