"""JSON as RFC 8259 has it, for what models and servers write and for the lines that every call leaves on disk.

NaN and Infinity, which Python's own reader takes, are errors. Lines and bodies go through orjson: with Python's own
encoder, three of them were a tenth of a call's processor time.
"""

import json
from typing import Any, NoReturn

import orjson


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# Finds the end of a value in the middle of a text, which orjson cannot. Made once: `json.loads` with a
# `parse_constant` makes one at every call.
DECODER = json.JSONDecoder(parse_constant=_refuse)


def decode(data: bytes) -> Any:
    """Raises ValueError for what is no JSON in UTF-8, half of a surrogate pair included, and for what is too deep."""
    return orjson.loads(data)


def encode(value: Any) -> bytes:
    """A value of plain types in UTF-8, on one line."""
    try:
        return orjson.dumps(value)
    except TypeError:  # half of a surrogate pair, an integer of more than 64 bits
        return json.dumps(value).encode("ascii")
