"""Experts on machines that are not known beforehand: who says where they are, and who reads it."""

from pathlib import Path
from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.published import heard_by_all, publish, withdraw
from maestro_jax.registry.description.reading import parse_registry

SERVE = ("vllm", "serve", "--port", "{port}")


def registry(**more: Any) -> dict[str, Any]:
    served = {"description": "d", "model": "m", "serve": SERVE}
    experts = (
        {"name": "Two", "endpoints": ("http://127.0.0.1:1/v1", "http://localhost:2/v1"), **served},
        {"name": "One", "endpoints": ("http://127.0.0.1:3/v1",), **served},
        {"name": "Hosted", "endpoints": ("https://example.org/v1",), "description": "d", "model": "m"},
    )
    skill = {"name": "S", "stages": ({"kind": "ask", "output": "a", "prompt": "{question}"},)}
    return {"experts": experts, "services": (), "skills": (skill,), **more}


def published(directory: Path, *hosts: str) -> None:
    for host in hosts:
        publish(directory, host, heard_by_all(parse_registry(registry()).experts))


def test_a_run_reaches_what_every_machine_has_published(tmp_path: Path) -> None:
    published(tmp_path, "gpu2", "gpu1")
    two, one, hosted = parse_registry(registry(endpoints_from=str(tmp_path))).experts
    assert two.endpoints == tuple(f"http://{host}:{port}/v1" for host in ("gpu1", "gpu2") for port in (1, 2))
    assert one.endpoints == ("http://gpu1:3/v1", "http://gpu2:3/v1")
    assert hosted.endpoints == ("https://example.org/v1",)
    assert two.serve == () == one.serve  # they are started elsewhere


def test_servers_listen_to_other_machines() -> None:
    two, one = heard_by_all(parse_registry(registry()).experts)
    assert two.endpoints == ("http://0.0.0.0:1/v1", "http://0.0.0.0:2/v1") and one.name == "One"


def test_what_is_withdrawn_is_not_reached(tmp_path: Path) -> None:
    published(tmp_path, "gpu1")
    withdraw(tmp_path, "gpu1")
    with pytest.raises(ConfigError, match="no expert is published there; start them with .*experts up --publish="):
        parse_registry(registry(endpoints_from=str(tmp_path)))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('{"Tow": ["http://gpu1:1/v1"]}', "'Tow' is published, and no expert of this registry; did you mean \"Two\"?"),
        ('{"Two": 7}', "is not what `experts up --publish` writes; remove it"),
        ("[1]", "is not what `experts up --publish` writes; remove it"),
        ('{"Two": ["http://', "is not what `experts up --publish` writes; remove it"),
    ],
)
def test_what_cannot_be_meant_is_an_error(tmp_path: Path, written: str, says: str) -> None:
    (tmp_path / "gpu1.json").write_text(written)
    with pytest.raises(ConfigError, match=".*") as caught:
        parse_registry(registry(endpoints_from=str(tmp_path)))
    assert says in str(caught.value)
