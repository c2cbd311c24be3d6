"""JSON as RFC 8259 has it, for what models and servers write and for the lines that every call leaves on disk.

NaN and Infinity, which Python's own reader takes, are errors. A type says what a text must hold; msgspec checks that
while it reads, so that nothing is checked by hand. docs/performance.md has what that costs.
"""

import json
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# Finds the end of a value in the middle of a text, which msgspec cannot. Made once: `json.loads` with a
# `parse_constant` makes one at every call.
DECODER = json.JSONDecoder(parse_constant=_refuse)

_ENCODER = msgspec.json.Encoder()


def decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A foreign text, as a value of the decoder's type.

    Raises:
      msgspec.ValidationError: it is JSON of another type.
      ValueError: it is no JSON in UTF-8, holds half of a surrogate pair, or is too deep.
    """
    try:
        data.decode()  # msgspec does not look at the bytes of what the type leaves out
        return decoder.decode(data)
    except RecursionError as error:
        raise ValueError("the text is too deep") from error


def decode_line(line: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """What `encode` wrote, which may hold half of a surrogate pair.

    Raises:
      ValueError: it is damaged, or of another type.
    """
    try:
        try:
            return decoder.decode(line)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            return msgspec.convert(json.loads(line), decoder.type)
    except RecursionError as error:
        raise ValueError("the line is too deep") from error


def encode(value: Any) -> bytes:
    """A value of plain types or structs in UTF-8, on one line."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(msgspec.to_builtins(value)).encode("ascii")
