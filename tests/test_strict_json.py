"""Lines and bodies as JSON: what is refused, and what every value comes back as."""

import json

import pytest

from maestro_jax.strict_json import decode, encode


@pytest.mark.parametrize(
    "text", [b"NaN", b"-Infinity", b"1e999", b'"\xff"', b'"\\ud800"', b'"\x01"', b"[" * 100_000, b"{}{}", b""]
)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        decode(text)


@pytest.mark.parametrize("value", ["\ud800", "é\u2028\U0001f600\x00", 2**70, 1e-7, {"a": [None, True, "\udfff"]}])
def test_every_value_comes_back_from_one_line(value):
    line = encode(value)
    assert b"\n" not in line
    assert json.loads(line) == value
