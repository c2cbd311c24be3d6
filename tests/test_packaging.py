"""What `setup.py` and the README's commands install."""

import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    found: dict[str, Any] = {}
    fake = types.SimpleNamespace(setup=lambda **given: found.update(given), find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return found["extras_require"]


def test_jax_chooses_the_compilers_and_drivers_that_go_with_it(extras: dict[str, list[str]]) -> None:
    for name in ("tpu", "cuda12", "cuda13"):
        assert [line.partition(">")[0] for line in extras[name]] == [f"jax[{name}]"]
    assert set(extras["tpu"]) <= set(extras["test"])
    assert not [line for lines in extras.values() for line in lines if line.startswith("libtpu")]


def test_the_test_command_installs_what_the_tests_ask_for() -> None:
    command = (ROOT / "README.md").read_text().partition("<!-- test-command -->")[2].partition("```\n")[0]
    assert "-e '.[suite,sandbox,test]'" in command
