"""JSON as RFC 8259 has it, for what models and servers write: NaN and Infinity, which Python would read, are errors."""

import json
from typing import NoReturn


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


# Made once: `json.loads` with a `parse_constant` makes one at every call.
DECODER = json.JSONDecoder(parse_constant=_refuse)
