"""Runs launch scripts against a gcloud, a kubectl and workers of their own (fakes/)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"


class Cloud:
    """A directory that the fakes keep their state in."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "failures").mkdir()
        (directory / "bin").mkdir()
        for fake in (FAKES / "gcloud.py", FAKES / "kubectl.py"):  # without site-packages Python starts in no time
            command = directory / "bin" / fake.stem
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {fake} "$@"\n')
            command.chmod(0o755)
        (directory / "python").write_text("#!/bin/sh\necho no module named jax >&2\nexit 1\n")
        (directory / "python").chmod(0o755)

    def launch(self, command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Runs "tpu_vm/create.sh --name=a ..." as a shell would; settings are environment variables."""
        environment = {
            "PATH": f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.directory),
            "TMPDIR": "/tmp",
            "FAKE_CLOUD": str(self.directory),
            "PYTHON": str(self.directory / "python"),
            "MAESTRO_PAUSE": "0",
            **settings,
        }
        return subprocess.run(
            ["bash", "-c", f"launch/{command}"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def lines(self, name: str, *lines: str) -> None:
        """What the fakes will answer (see there)."""
        (self.directory / name).write_text("".join(f"{line}\n" for line in lines))

    def calls(self, *words: str) -> list[str]:
        """Commands so far that hold all the words."""
        path = self.directory / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        return [line for line in found if all(word in line for word in words)]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)
