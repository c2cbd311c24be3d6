"""The benchmark of grading: its answers have the verdicts that it says, and every figure is printed."""

import pytest

from benchmarks import grading


def test_every_figure_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, few in (("PLAIN", 6), ("EXPRESSIONS", 4), ("HOSTILE", 1)):
        monkeypatch.setattr(grading, name, few)
    grading.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*grading.plain_cases(), "expressions", "hostile"]
