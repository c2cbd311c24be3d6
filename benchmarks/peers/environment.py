"""A peer's virtual environment: made from its pinned requirements, kept in a cache, made anew when they change."""

import fcntl
import re
import subprocess
import sys
from pathlib import Path

from absl import flags

from maestro_jax.errors import ConfigError
from maestro_jax.observe.progress import Progress

CACHE = Path("~/.cache/maestro_jax/benchmarks")
PEERS = flags.DEFINE_string("peers", str(CACHE), "Directory of the peers' virtual environments, up to 1.6 GB each.")
_STAMP = "installed.txt"  # the requirements an environment was made of; written last, so that half of one has none
_PACKAGE = re.compile(r"(?:Collecting|Processing) (\S+)")  # from the index, from a local file


def python(requirements: Path, cache: Path, progress: Progress) -> Path:
    """The interpreter of the environment that holds `requirements`; made where there is none.

    Args:
      requirements: a file of pinned packages; its stem names the environment.
      cache: the directory of all environments.

    Raises:
      ConfigError: the environment cannot be made.
    """
    directory = cache.expanduser() / requirements.stem
    stamp, interpreter = directory / _STAMP, directory / "bin" / "python"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Of two that want it at the same time, the second waits and finds it made.
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stamp.is_file() or stamp.read_text() != requirements.read_text():
                _make(directory, interpreter, requirements, progress)
                stamp.write_text(requirements.read_text())
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be made ({error}); choose one that you may write to with --peers"
        ) from error
    return interpreter


def _make(directory: Path, interpreter: Path, requirements: Path, progress: Progress) -> None:
    if any(directory.iterdir()) and not (directory / "pyvenv.cfg").is_file():
        raise ConfigError(
            f"{directory} is no virtual environment and would be cleared; choose another place with --peers"
        )
    progress.phase(f"install {requirements.stem} into {directory}", _packages(requirements))
    _run([sys.executable, "-m", "venv", "--clear", str(directory)], requirements, progress)
    install = ["-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", "-r", str(requirements)]
    _run([str(interpreter), *install], requirements, progress)


def _packages(requirements: Path) -> int:
    return sum("==" in line for line in requirements.read_text().splitlines())


def _run(command: list[str], requirements: Path, progress: Progress) -> None:
    """Runs a step of the installation; moves the bar with every package that pip collects."""
    lines, collected = [f"{command[0]} wrote nothing"], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if found := _PACKAGE.match(line.strip()):
                collected += 1
                progress.update(collected, {"package": Path(found[1]).name})
    if process.returncode:
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise ConfigError(
            f"{requirements} could not be installed: {said} -- check the network, the package index (pip config list) "
            "and the free space; --peers chooses another directory"
        )
