"""What the scripts would do: equal to golden files, readable by a shell, and nothing that gcloud does not know."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.golden import FILES, REPOSITORY, commands, written_anew

DOCUMENTS = [*sorted(REPOSITORY.glob("docs/*.md")), *sorted(REPOSITORY.glob("launch/**/*.md"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dry_run_prints_what_it_did(file: Path) -> None:
    text = file.read_text()
    assert commands(text)
    assert written_anew(text) == text, "if this is wanted, run `python tests/launch/golden.py` and read the difference"


def gcloud_lines() -> list[str]:
    """Every gcloud command of the golden files and of the documents."""
    found = []
    for text in [*(file.read_text() for file in FILES), *(blocks(file.read_text()) for file in DOCUMENTS)]:
        found += [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("gcloud ")]
    return found


def blocks(markdown: str) -> str:
    """The commands of a document, its variables being some names."""
    found = "\n".join(re.findall(r"^```bash\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL))
    return re.sub(r'"?\$[A-Z_]+"?', "some-name", found)


def test_printed_commands_can_be_pasted() -> None:
    lines = gcloud_lines()
    assert len(lines) > 10
    for line in lines:
        assert shlex.split(line)[0] == "gcloud"


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed: its lines are not checked")
def test_gcloud_knows_every_line(tmp_path: Path) -> None:
    commands = [{"command_string": line, "id": number} for number, line in enumerate(gcloud_lines(), start=1)]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps(commands))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}", "--serialize"]
    result = subprocess.run(lint, capture_output=True, text=True, timeout=300)
    if result.returncode and "Invalid choice" in result.stderr:
        pytest.skip("this gcloud has no `gcloud meta lint-gcloud-commands`: its lines are not checked")
    assert result.returncode == 0, result.stderr
    findings = [finding for of_one in json.loads(result.stdout).values() for finding in of_one]
    assert {finding["command_string"] for finding in findings if not finding["success"]} == set(), findings
    assert len(findings) == len({command["command_string"] for command in commands})


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed: its lines are not checked")
def test_the_lint_finds_a_wrong_flag() -> None:
    wrong = "gcloud compute tpus tpu-vm create run1 --zone=a --accelerator-type=v6e-4 --version=x --spott"
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={wrong}", "--serialize"]
    result = subprocess.run(lint, capture_output=True, text=True, timeout=60)
    assert "unrecognized arguments: --spott" in result.stdout
