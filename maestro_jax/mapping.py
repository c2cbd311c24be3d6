"""Plain mappings read as frozen dataclasses: every key known, every value of its type.

Configs and registries come in, from Python or JSON. A mistake is one line that names the setting and the cure.
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from maestro_jax.errors import ConfigError

T = TypeVar("T")
Reader = Callable[[Any, str], Any]  # (value, where it stands) → what the dataclass gets
_WORDS = {str: "a text", bool: "True or False", int: "an integer", float: "a number"}


def read(cls: type[T], raw: Any, where: str, readers: Mapping[Any, Reader] | None = None) -> T:
    """Builds the dataclass `cls` from a mapping; settings that it lacks keep their defaults.

    Fields may be texts, numbers, truth values, `Literal` texts, mappings, further dataclasses, and tuples of these.

    Args:
      raw: a dict, or anything with the methods of one, such as an ml_collections ConfigDict.
      where: what errors call it, such as "config.grpo".
      readers: type of a field → what reads such fields in place of this function, at any depth.

    Raises:
      ConfigError: an unknown key, one without default that is missing, or a value of another type.
    """
    values, hints, own = mapping(raw, where), typing.get_type_hints(cls), readers or {}
    for key in values:
        if key not in hints:
            raise ConfigError(f"unknown key {where}.{key}; {_nearest(str(key), hints, where)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise ConfigError(f'{where} lacks "{field.name}"; add it')
    return cls(**{key: _value(hints[key], value, f"{where}.{key}", own) for key, value in values.items()})


def mapping(raw: Any, where: str) -> dict[str, Any]:
    """A mapping of settings as a plain dict (`plain`); anything else is an error."""
    if not hasattr(raw, "keys") or not hasattr(raw, "items"):
        raise ConfigError(f"{where} must be a mapping of settings, found {type(raw).__name__}")
    return plain(raw)


def plain(raw: Any) -> Any:
    """Mappings as dicts and lists as tuples, all the way down; a ConfigDict is no `Mapping`, so its methods count."""
    if hasattr(raw, "keys") and hasattr(raw, "items"):
        return {key: plain(value) for key, value in raw.items()}
    return tuple(map(plain, raw)) if isinstance(raw, list | tuple) else raw


def _value(hint: Any, value: Any, where: str, readers: Mapping[Any, Reader]) -> Any:
    if hint in readers:
        return readers[hint](value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else read(hint, value, where, readers)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in arguments:
            return value
        known = ", ".join(map(str, arguments))
        raise ConfigError(f"{where} {value!r:.60} is unknown; use one of {known}")
    if origin is tuple:
        return _tuple(arguments[0], value, where, readers)
    if origin in (dict, Mapping):
        inner = arguments[1]
        if isinstance(value, dict) and (inner is Any or all(isinstance(item, inner) for item in value.values())):
            return value
        raise ConfigError(f"{where} must be a mapping{'' if inner is Any else ' of texts'}, found {value!r:.60}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {_WORDS[hint]}, found {value!r:.60}")
    return value


def _tuple(inner: Any, value: Any, where: str, readers: Mapping[Any, Reader]) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_value(inner, item, f"{where}[{_index(item, i)}]", readers) for i, item in enumerate(value))
    kind = {str: "texts", int: "integers", float: "numbers"}.get(inner, "mappings")
    if typing.get_origin(inner) is typing.Literal:
        kind = "texts"
    if kind == "mappings":
        raise ConfigError(f"{where} must be a tuple of mappings, found {type(value).__name__}")
    cure = f"; a tuple of one needs a comma: ({value!r:.40},)" if isinstance(value, str | int | float) else ""
    raise ConfigError(f"{where} must be a tuple of {kind}, found {value!r:.60}{cure}")


def _index(entry: Any, i: int) -> str:
    """The name of an entry, as people look for it; its number if it has none."""
    name = entry.get("name") if hasattr(entry, "keys") else None
    return f'"{name}"' if name and isinstance(name, str) else str(i)


def _nearest(key: str, known: Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {where}.{near[0]}?" if near else f"its keys are {', '.join(known)}"
