"""Where experts are whose machines are not known beforehand: `experts up --publish` says, a run's registry reads.

A directory, the same for all machines, with a file of each that serves: HOST.json, {expert: [URL, ...]}.

Who can write to that directory decides where experts are. It does not decide where a key goes: that is the config's
(`hosts.py`).
"""

import dataclasses
import json
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path

from maestro_jax.errors import ConfigError
from maestro_jax.observe.files import write_json
from maestro_jax.registry.description.config import ExpertConfig
from maestro_jax.registry.description.hosts import check_key_goes, check_url
from maestro_jax.registry.description.names import nearest

EVERYWHERE = "0.0.0.0"  # as the address of a server: it listens to other machines, too


def heard_by_all(experts: Iterable[ExpertConfig]) -> tuple[ExpertConfig, ...]:
    """The experts that are served here, listening to all machines."""
    return tuple(
        dataclasses.replace(expert, endpoints=tuple(_at(url, EVERYWHERE) for url in expert.endpoints))
        for expert in experts
        if expert.serve
    )


def publish(directory: Path, host: str, experts: Iterable[ExpertConfig]) -> Path:
    """Says that this machine, which others call `host`, serves the experts; returns the file that does."""
    directory.mkdir(parents=True, exist_ok=True)
    path = _file(directory, host)
    write_json(path, {expert.name: [_at(url, host) for url in expert.endpoints] for expert in experts})
    return path


def withdraw(directory: Path, host: str) -> None:
    """Takes back what `publish` said."""
    _file(directory, host).unlink(missing_ok=True)


def reached(experts: Iterable[ExpertConfig], directory: Path) -> tuple[ExpertConfig, ...]:
    """The experts, those that are published at the URLs they are published with, on all machines together.

    Raises:
      ConfigError: nobody has published anything, or an expert that is not among these, or an endpoint that is none or
        is where the expert's key may not go.
    """
    known = {expert.name: expert for expert in experts}
    found: dict[str, list[str]] = {}
    for path in sorted(directory.glob("*.json")):
        for name, urls in _read(path).items():
            if name not in known:
                raise ConfigError(
                    f"{path}: {name!r} is published, and no expert of this registry; {nearest(name, list(known))}"
                )
            for url in urls:
                check_url(url, f'{path}: expert "{name}"')
                check_key_goes(known[name], url, str(path))
            found.setdefault(name, []).extend(urls)
    if not found:
        cure = "start them with `python -m maestro_jax.experts up --publish=` this directory, or leave it empty"
        raise ConfigError(f"registry.endpoints_from={str(directory)!r}: no expert is published there; {cure}")
    return tuple(
        dataclasses.replace(expert, endpoints=tuple(found[expert.name]), serve=()) if expert.name in found else expert
        for expert in known.values()
    )


def _file(directory: Path, host: str) -> Path:
    return directory / f"{host}.json"


def _read(path: Path) -> Mapping[str, list[str]]:
    try:
        values = json.loads(path.read_text())
        if all(isinstance(url, str) for urls in values.values() for url in urls):
            return values
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        pass
    raise ConfigError(f"{path} is not what `experts up --publish` writes; remove it")


def _at(url: str, host: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=f"{host}:{parts.port}").geturl()
