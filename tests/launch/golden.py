"""What the scripts print in a dry run, kept in golden/*.txt.

A file holds commands ("$ launch/...") with what they print below them. After a wanted change
`python tests/launch/golden.py` writes the files anew; read the difference before it is committed.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "golden").glob("*.txt"))


def commands(text: str) -> list[str]:
    return re.findall(r"^\$ (.*)$", text, re.MULTILINE)


def written_anew(text: str) -> str:
    """The text of a golden file with what its commands print now."""
    return "\n".join(f"$ {command}\n{printed(command)}" for command in commands(text))


def printed(command: str) -> str:
    """What a command prints; the paths of this checkout and of temporary files have names in their place."""
    temporary = tempfile.gettempdir()
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "HOME": "/", "TMPDIR": temporary},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if result.returncode:
        return f"exit code {result.returncode}\n{result.stderr}"
    return result.stdout.replace(str(REPOSITORY), "REPOSITORY").replace(f"{temporary}/", "TEMPORARY/")


if __name__ == "__main__":
    for file in FILES:
        file.write_text(written_anew(file.read_text()))
