"""`python -m maestro_jax.doctor`: every finding on a line with its cure, exit code 0 or 78."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.registry import suite
from maestro_jax.doctor import unset_variables
from maestro_jax.registry.config import problems, read_registry

ROOT = Path(__file__).parent.parent


def doctor(config: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, list[str], str]:
    """Exit code, printed lines, and what was written to stderr."""
    command = [sys.executable, "-m", "maestro_jax.doctor", f"--config={config}", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables, cwd=ROOT)
    return done.returncode, done.stdout.splitlines(), done.stderr


def written(path: Path, change: str) -> Path:
    """A quickstart config whose registry is changed by a few lines."""
    text = f"""
    from configs import quickstart

    def get_config():
        config = quickstart.get_config()
        registry = config.registry
{textwrap.indent(textwrap.dedent(change), " " * 8)}
        return config
    """
    file = path / "changed.py"
    file.write_text(textwrap.dedent(text))
    return file


def test_a_sound_registry_is_ready() -> None:
    code, lines, _ = doctor(ROOT / "configs" / "quickstart.py")
    assert code == 0
    assert lines[0] == "config: 5 experts, 4 services, 7 skills, 0 problems"
    assert lines[1:] == [
        f'expert "{name}": ready' for name in ("Glyph-Reader", "Chart-Lens", "Shape-Sight", "Tally", "Sym-Solver")
    ]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    change = """
    registry.services = registry.services[1:]
    registry.skills[2]["children"] = ("Text_Recognition", "Key_Informations")
    registry.show = ("prize",)
    """
    code, lines, errors = doctor(written(tmp_path, change))
    assert code == 78
    assert lines == [
        'skill "Chart_Problem_Solver" stage 1 ("ocr"): unknown service "ocr"; valid: zoom, detect, caption',
        'skill "OCR_Problem_Solver": unknown child "Key_Informations"; did you mean "Key_Information"?',
        'skill "Geometric_Problem_Solver" stage 2 ("ocr"): unknown service "ocr"; valid: zoom, detect, caption',
        'registry.show has "prize"; did you mean "price"?',
        "config: 5 experts, 3 services, 7 skills, 4 problems",
    ]
    assert errors.strip() == "error: 4 problems in the registry; the lines above say what to do about each"


def test_the_rest_of_the_run_must_fit_too(tmp_path: Path) -> None:
    code, lines, _ = doctor(written(tmp_path, "config.grpo.group_size = 1"), "--static")
    assert code == 78 and lines[0] == "config.grpo.group_size=1 gives no contrast; use at least 2"


def test_static_asks_nobody() -> None:
    code, lines, _ = doctor(ROOT / "configs" / "quickstart.py", "--static")
    assert code == 0 and len(lines) == 1


def test_a_wrong_key_is_one_line(tmp_path: Path) -> None:
    code, _, errors = doctor(written(tmp_path, 'registry.experts[0]["prise"] = 1.0'))
    assert code == 78 and errors.strip() == 'error: registry.experts[0]: unknown key "prise"; its keys'
