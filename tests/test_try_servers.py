"""Servers are asked once before a run starts: what ends the start, and what is only said."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.session.calls import try_servers
from tests import outage

NOBODY = "http://127.0.0.1:1/v1"


@pytest.fixture
def server() -> Any:
    found = outage.Server()
    yield found
    found.stop()


def tried(directory: Path, *endpoints: str) -> str:
    """What the start writes."""
    expert = {"name": "Chart-Lens", "description": "reads charts", "endpoints": endpoints, "model": "m"}
    skill = {"name": "Ask", "description": "asks", "stages": ({"kind": "ask", "prompt": "{question}", "output": "a"},)}
    config: Any = SimpleNamespace(registry=parse_registry({"experts": (expert,), "services": (), "skills": (skill,)}))
    stream = io.StringIO()
    try_servers(config, directory, Progress(stream, terminal=False))
    return stream.getvalue()


def test_all_is_well(server: outage.Server, tmp_path: Path) -> None:
    assert tried(tmp_path, server.url) == "" and server.answered == 1


def test_a_new_run_whose_expert_nobody_answers_for_does_not_start(tmp_path: Path) -> None:
    """A mistyped port looks like that; the run once made its baselines without the expert."""
    with pytest.raises(ConfigError, match=f"Chart-Lens.*{NOBODY}: no connection.*start its server.*--skip_doctor"):
        tried(tmp_path, NOBODY)


def test_a_run_that_goes_on_says_who_is_away_and_waits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert f'expert "Chart-Lens": {NOBODY}: no connection' in tried(tmp_path, NOBODY)


def test_one_endpoint_of_several_may_be_away(server: outage.Server, tmp_path: Path) -> None:
    assert NOBODY in tried(tmp_path, server.url, NOBODY)


@pytest.mark.parametrize("begun", [False, True])
def test_a_server_that_refuses_ends_the_start(begun: bool, server: outage.Server, tmp_path: Path) -> None:
    if begun:
        (tmp_path / "config.json").write_text("{}")
    server.refuses = 401
    with pytest.raises(ConfigError, match="Chart-Lens.*HTTP 401"):
        tried(tmp_path, server.url)
