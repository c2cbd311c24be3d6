"""The script of docs/api.md: own questions, grader and expert, in at most 25 lines."""

import os
import subprocess
import sys
from pathlib import Path

from maestro_jax.observe.files import read_json
from maestro_jax.observe.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def test_own_questions_grader_and_expert_are_trained_and_evaluated_by_a_short_script(tmp_path: Path) -> None:
    text = (ROOT / "docs/api.md").read_text()
    script = text[text.index("## Your own problem") :].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in script.splitlines() if line.strip()]) <= 25
    (tmp_path / "sums.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiled quickly, on one device
    command = [sys.executable, "sums.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(tmp_path / "runs/sums/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    summary, report = (
        read_json(tmp_path / "runs" / name) for name in ("sums/summary.json", "sums-evaluation/evaluation.json")
    )
    # The one pair is always right, an untrained policy is not.
    assert summary["accuracy"]["best_single_pair"] == 1.0 and summary["accuracy"]["trained"] < 1.0
    assert report["benchmarks"].keys() == {"sums"} and report["tasks"] == 32
    assert done.stdout.splitlines()[-1].startswith(
        f"{summary['accuracy']['trained']} {summary['accuracy']['trained']} "
    )
