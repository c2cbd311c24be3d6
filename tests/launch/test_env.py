"""Flag files of launch/env, fed to the compilers that they are for: libtpu's ahead of time, and jaxlib's parser."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.golden import REPOSITORY

COMPILE = str(Path(__file__).with_name("compile_for_tpu.py"))
SLICES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}
MINE = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "PYTHON": sys.executable,
    "JAX_PLATFORMS": "",
    "XLA_FLAGS": "",
    "LIBTPU_INIT_ARGS": "",
}
# Newer compilers refuse to gather beside matmuls but on v6e (launch/env/v5p.sh).
IS_TESTED = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3])) <= (0, 0, 42)
BESIDE = SLICES.keys() if IS_TESTED else {"v6e"}


def sourced(chip: str, **before: str) -> dict[str, str]:
    """The environment after `source launch/env/CHIP.sh`."""
    script = f"set -euo pipefail; source launch/env/{chip}.sh; env -0"
    command = ["bash", "-c", script]
    result = subprocess.run(command, cwd=REPOSITORY, env=MINE | before, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if line)


def compiled(topology: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, COMPILE, topology]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def parsed(flags: str) -> subprocess.CompletedProcess[str]:
    """XLA of the CPU knows the flags of GPUs as well."""
    environment = MINE | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("chip", SLICES)
def test_libtpu_takes_the_flags_and_computes_while_it_gathers(chip: str) -> None:
    result = compiled(SLICES[chip], sourced(chip))
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == ("beside\n" if chip in BESIDE else "one after the other\n")


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_without_its_flags_a_chip_waits_for_gathers(chip: str) -> None:
    assert compiled(SLICES[chip], MINE).stdout == "one after the other\n"


def test_libtpu_refuses_a_flag_that_it_does_not_know() -> None:
    result = compiled(SLICES["v5p"], sourced("v5p", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true"))
    assert result.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in result.stdout + result.stderr


def test_jaxlib_takes_the_flags_of_gpus() -> None:
    flags = sourced("h100")["XLA_FLAGS"]
    assert "--xla_gpu_" in flags
    result = parsed(flags)
    assert result.returncode == 0, result.stderr[-2000:]


def test_jaxlib_refuses_a_flag_that_it_does_not_know() -> None:
    result = parsed(sourced("h100", XLA_FLAGS="--xla_gpu_no_such_flag=true")["XLA_FLAGS"])
    assert result.returncode != 0 and "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=true" in result.stderr


def test_what_is_set_already_stays() -> None:
    before = {"JAX_PLATFORMS": "cpu", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "XLA_FLAGS": "--mine"}
    found = sourced("h200", **before)
    assert {key: found[key] for key in before} == before | {"XLA_FLAGS": sourced("h100")["XLA_FLAGS"] + "--mine"}
    assert sourced("v6e", LIBTPU_INIT_ARGS="--mine=1")["LIBTPU_INIT_ARGS"].endswith("true --mine=1")


def test_every_file_is_tried() -> None:
    files = {path.stem for path in (REPOSITORY / "launch/env").iterdir()}
    assert files == {*SLICES, "h100", "h200", "cpu"}
    assert sourced("h200") == sourced("h100") and sourced("cpu", JAX_PLATFORMS="tpu")["JAX_PLATFORMS"] == "cpu"
