"""The classes that a registry names by `implementation`: built, called by their contract, told apart.

An expert's class has `answer(messages) -> str`, a service's `run(images, text) -> (str, images)`. They are foreign
code: what they return is checked here.
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.plugins import load, one_line
from maestro_jax.registry.description.config import ExpertConfig, ServiceConfig
from maestro_jax.registry.description.interface import Message

MAX_TEXT = 2**20  # characters of a reply; one that is longer is a fault
MAX_IMAGES = 2**26  # bytes of all images of a result


class SpecialistError(Exception):
    """A specialist raised, returned what it must not, or is gone; where there is a cause, it is chained."""


def build(where: str, implementation: str, options: Mapping[str, Any]) -> Any:
    """An instance of the class.

    Raises:
      ConfigError: opened by `where`, there is no such class, or it refuses its options.
    """
    cls = load(implementation, f"{where}: implementation")
    try:
        return cls(**options)
    except Exception as error:  # foreign constructor: anything may be raised
        cure = "correct its options in the registry config"
        raise ConfigError(f"{where} cannot be built from {implementation} ({one_line(error)}); {cure}") from error


def answer(specialist: Any, messages: Sequence[Message]) -> str:
    """What an expert's class answers.

    Raises:
      SpecialistError: it returned no text, or too much. What it raises comes through.
    """
    text = specialist.answer(messages)
    if not isinstance(text, str):
        raise SpecialistError(f"answer returned {type(text).__name__}, not str")
    return _capped(text)


def run(specialist: Any, images: tuple[bytes, ...], text: str) -> tuple[str, tuple[bytes, ...]]:
    """What a service's class makes.

    Raises:
      SpecialistError: it returned something else than text and images, or too much. What it raises comes through.
    """
    made, pictures = specialist.run(images, text)
    if not isinstance(made, str) or not all(isinstance(image, bytes) for image in pictures):
        raise SpecialistError("run must return (str, tuple of bytes)")
    if sum(map(len, pictures)) > MAX_IMAGES:
        raise SpecialistError(f"run returned images of more than {MAX_IMAGES} bytes")
    return _capped(made), tuple(pictures)


def _capped(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise SpecialistError(f"it returned a text of {len(text)} characters; at most {MAX_TEXT} are taken")
    return text


def implementation_identity(config: ExpertConfig | ServiceConfig) -> str:
    """What a kept reply depends on besides the request: class, options, and the sources beside the class.

    All modules of its folder count, so that a reply cache on disk does not outlive a change of the
    specialist or of what it shares with its neighbours.
    """
    cls = load(config.implementation, f"{config.name}: implementation")
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    digest = hashlib.sha256()
    for source in sorted(pathlib.Path(file).parent.glob("*.py")) if file else ():
        digest.update(source.read_bytes())
    options = json.dumps(dict(config.options), sort_keys=True, default=repr)
    return f"{config.implementation} {options} {digest.hexdigest()}"
