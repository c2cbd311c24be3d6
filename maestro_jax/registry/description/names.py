"""Names of experts, services and skills: how they are compared, and how they are written in errors.

They match exactly (case-insensitive; "-", "_" and " " are equal), never by substring.
"""

import difflib
import functools
from collections.abc import Iterable

_SEPARATORS = str.maketrans({"-": "_", " ": "_"})


@functools.lru_cache(maxsize=1024)  # every call compares some, mostly the registry's own
def normalise_name(name: str) -> str:
    """The form in which two names are compared."""
    return name.strip().casefold().translate(_SEPARATORS)


def nearest(word: str, valid: Iterable[str]) -> str:
    """The cure for a misspelt word: the nearest valid one, else all of them."""
    valid = list(valid)
    by_form = {normalise_name(v): v for v in valid}
    close = difflib.get_close_matches(normalise_name(str(word)), by_form, n=1)
    if close:
        return f'did you mean "{by_form[close[0]]}"?'
    return f"valid: {listed(valid) or 'none yet'}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def quote(name: str) -> str:
    """A name the policy wrote, short enough for an error observation."""
    shown = " ".join(name.split())
    return f'"{shown[:37]}..."' if len(shown) > 40 else f'"{shown}"'
