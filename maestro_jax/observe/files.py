"""Small JSON files of a run, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON through a temporary name, so that a kill leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
    temporary.replace(path)


def read_json(path: str | os.PathLike[str]) -> Any | None:
    """The file's content, or None where there is no file."""
    path = Path(path)
    return json.loads(path.read_text()) if path.is_file() else None
