"""The benchmark of the policy at toy size: what it writes, and that it times nothing where the two sides differ."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from absl.testing import flagsaver

from benchmarks import models, pairs, policy
from benchmarks.pairs import MismatchError

PAIRS = 2
PARTS = ("prefill", "decode", "generate")
MEASURES = {"forward", *PARTS, *(f"{part}_group" for part in PARTS)}


@pytest.fixture(autouse=True)
def flags_and_threads(tmp_path: Path) -> Iterator[None]:
    """The flags of a command line, and torch's threads as they were before."""
    threads = torch.get_num_threads()
    with flagsaver.as_parsed(smoke="true", pairs=str(PAIRS), json=str(tmp_path / "found.json")):
        yield
    torch.set_num_threads(threads)


def test_every_measure_is_written_with_its_pairs_and_its_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.main([])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == MEASURES
    for entry in found.values():
        assert {"ours", "theirs", "device", "threads", "versions", "command", "compile_seconds"} <= entry.keys()
        assert len(entry["pairs"]) == PAIRS and all(seconds > 0 for pair in entry["pairs"] for seconds in pair)
        ratios = sorted(theirs / ours for ours, theirs in entry["pairs"])
        assert entry["ratio"] == pytest.approx(sum(ratios) / PAIRS)  # the median of two
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in MEASURES)


@pytest.mark.parametrize("place", ["model.visual.merger.linear_fc2", "model.language_model.layers.1.mlp.up_proj"])
def test_a_wrong_weight_is_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = models.transformers_model

    def with_a_wrong_weight(ours: models.OurPolicy) -> Any:
        model = copied(ours)
        model.get_submodule(place).weight.data[0, 0] += 0.5
        return model

    monkeypatch.setattr(models, "transformers_model", with_a_wrong_weight)
    with pytest.raises(MismatchError, match="nothing was timed"):
        policy.main([])
    assert not (tmp_path / "found.json").exists()


def test_other_tokens_are_refused() -> None:
    ours, theirs = (models.Generated(torch.tensor([[1, last]]).numpy(), 0.0, 0.0) for last in (2, 3))
    with pytest.raises(MismatchError, match="member 0 .* token 1"):
        policy._same_tokens(ours, theirs)


def test_the_sides_take_turns_in_going_first() -> None:
    order: list[str] = []

    def side(name: str) -> dict[str, float]:
        order.append(name)
        return {"work": 1.0 if name == "ours" else 2.0}

    found = pairs.interleave(lambda: side("ours"), lambda: side("theirs"), 3, "work", pairs.Progress())
    assert found == {"work": [(1.0, 2.0)] * 3}
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
