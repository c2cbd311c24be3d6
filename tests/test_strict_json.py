"""Lines and bodies as JSON: what is refused, and what every value comes back as."""

import json
from typing import Any

import msgspec
import pytest

from maestro_jax.strict_json import decode, decode_line, encode

ANY = msgspec.json.Decoder(Any)
NAMED = msgspec.json.Decoder(msgspec.defstruct("Named", [("name", str)]))


@pytest.mark.parametrize(
    "text", [b"NaN", b"-Infinity", b"1e999", b'"\xff"', b'"\\ud800"', b'"\x01"', b"[" * 100_000, b"{}{}", b""]
)
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        decode(text, ANY)


@pytest.mark.parametrize("value", [b"NaN", b'"\xff"', b'"\\ud800"', b'"\x01"', b"[" * 100_000])
def test_what_the_type_leaves_out_has_to_be_json_too(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode(b'{"name": "x", "other": ' + value + b"}", NAMED)


@pytest.mark.parametrize(
    "line", [b'{"name": 7}', b'{"name": "x"', b'{"name": "\xff"}', b'["\\ud800",' + b"[" * 100_000]
)
def test_a_damaged_line_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode_line(line, NAMED)


@pytest.mark.parametrize("value", ["\ud800", "é\u2028\U0001f600\x00", 2**70, 1e-7, {"a": [None, True, "\udfff"]}])
def test_every_value_comes_back_from_one_line(value: Any) -> None:
    line = encode(value)
    assert b"\n" not in line
    assert json.loads(line) == decode_line(line, ANY) == value
