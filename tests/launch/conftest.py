"""Runs launch scripts against a gcloud, a kubectl and workers of their own (fakes/)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"
FAST_PYTHON = f"{sys.executable} -I -S"  # without site-packages it starts in no time


class Cloud:
    """A directory that the fakes keep their state in."""

    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "failures").mkdir()
        (directory / "bin").mkdir()
        self.program("gcloud", f'exec {FAST_PYTHON} {FAKES}/gcloud.py "$@"')
        self.program("kubectl", f'exec {FAST_PYTHON} {FAKES}/kubectl.py "$@"')
        self.program("no-jax", "exit 1")

    def program(self, name: str, *script: str) -> None:
        """Puts a program on the PATH of what is launched."""
        self.lines(f"bin/{name}", "#!/bin/sh", *script)
        (self.directory / "bin" / name).chmod(0o755)

    def launch(self, command: str, seconds: int = 60, **settings: str) -> subprocess.CompletedProcess[str]:
        """Runs "tpu_vm/create.sh --name=a ..." as a shell would; settings are environment variables."""
        return self.run(f"launch/{command}", seconds, **settings)

    def run(self, command: str, seconds: int = 60, **settings: str) -> subprocess.CompletedProcess[str]:
        """What a shell in the root of the repository says to a command."""
        environment = {
            "PATH": f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.directory),
            "TMPDIR": "/tmp",
            "FAKE_CLOUD": str(self.directory),
            "PYTHON": "no-jax",
            "MAESTRO_PAUSE": "0",
            **settings,
        }
        return subprocess.run(
            ["bash", "-c", command],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
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
