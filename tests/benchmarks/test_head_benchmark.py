"""The benchmark of the head at toy size: what it writes, and that it times nothing where the two sides differ."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from absl.testing import flagsaver

from benchmarks import head
from benchmarks.pairs import MismatchError

PAIRS = 2


@pytest.fixture(autouse=True)
def command_line(tmp_path: Path) -> Iterator[None]:
    with flagsaver.as_parsed(smoke="true", pairs=str(PAIRS), json=str(tmp_path / "found.json")):
        yield


def test_time_and_memory_of_both_sides_are_written(tmp_path: Path) -> None:
    head.main([])
    found = json.loads((tmp_path / "found.json").read_text())["H1"]
    assert {"ratio", "ours", "theirs", "device", "command", "compile_seconds", "resident_peak_mib"} <= found.keys()
    assert len(found["pairs"]) == PAIRS and all(seconds > 0 for pair in found["pairs"] for seconds in pair)
    logits = head.TOY.rows * head.TOY.vocabulary * 4 / 2**20
    assert found["temporaries_mib"]["theirs"] >= logits > found["temporaries_mib"]["ours"] > 0


@pytest.mark.parametrize("scale", [1.001, float("nan")])
def test_a_wrong_value_is_refused(scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = head.naive_head

    def wrong(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs, entropies = right(*inputs)
        return logprobs, scale * entropies

    monkeypatch.setattr(head, "naive_head", wrong)
    with pytest.raises(MismatchError, match="entropies differ by .* nothing was timed"):
        head.main([])
    assert not (tmp_path / "found.json").exists()
