"""Foreign words in our templates and our words in foreign text: filling, choosing, and what a model said at last."""

import re
from collections.abc import Iterable, Mapping

from maestro_jax.registry.description.names import normalise_name
from maestro_jax.registry.description.stages import PLACEHOLDER

# What one value may add to a prompt, in characters: an expert that repeats itself must not overflow the next context.
LONGEST_VALUE = 16_000
_GAP = "\n[...]\n"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces {name} in one pass: a value is never read as a template. Long ones keep head and tail."""
    return PLACEHOLDER.sub(lambda match: shortened(values[match[1]]), template)


def shortened(text: str, most: int = LONGEST_VALUE) -> str:
    """`text`, or its head and tail where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = (most - len(_GAP)) // 2
    return text[:half] + _GAP + text[-half:]


def said(reply: str) -> str:
    """A reply without the thoughts that some models write before it."""
    return reply.rpartition("</think>")[2].strip()


def program_in(reply: str) -> str:
    """The last fenced block of a reply; all of it where nothing is fenced. Nothing is run or compiled here."""
    blocks = _FENCE.findall(reply)
    return (blocks[-1] if blocks else reply).strip()


def named_in(text: str, keys: Iterable[str]) -> str | None:
    """The key that `text` equals, or the only one it contains as words."""
    keys = list(keys)
    form = normalise_name(text.strip(" \t\r\n.,;:!?\"'"))
    equal = [key for key in keys if normalise_name(key) == form]
    named = equal or [key for key in keys if occurrences([key], text)]
    return named[0] if len(named) == 1 else None


def occurrences(phrases: Iterable[str], text: str) -> int:
    """How often the phrases occur in `text` as whole words, whatever their case."""
    folded = text.casefold()
    return sum(len(re.findall(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", folded)) for phrase in phrases)
