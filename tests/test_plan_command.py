"""`python -m maestro_jax.plan` with the real TPU compiler: no TPU is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from configs import quickstart, qwen3_vl_4b
from maestro_jax.aot.nearest import changes
from maestro_jax.aot.program import Program
from maestro_jax.aot.report import verdict
from maestro_jax.aot.topology import GIB, Target, tpu_target
from maestro_jax.errors import ConfigError

# The quickstart with lengths that splash attention takes.
LENGTHS = [
    "--config.policy.image_buckets=(128,)",
    "--config.policy.prefix_buckets=(128,)",
    "--config.rollout.room=128",
    "--config.rollout.member_buckets=(128,)",
]


def run(path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON and what was printed."""
    command = [sys.executable, "-m", "maestro_jax.plan", f"--json={path}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(path.read_text()), result.stdout


def test_a_small_run_for_four_chips(tmp_path: Path) -> None:
    found, printed = run(tmp_path / "plan.json", "--config=configs/quickstart.py", "--topology=v5e:2x2", *LENGTHS)
    assert found["fits"] and found["chips"] == 4 and not found["estimated"]
    assert "fits: " in printed and "v5e:2x2: 4 x TPU v5 lite, 15.75 GiB a chip" in printed
    chip = found["per_chip"]
    assert chip["limit"] == int(15.75 * GIB)
    assert 0 < chip["total"] == chip["arguments"] + chip["temporaries"] + chip["beside"] < GIB
    assert found["flops_per_chip"] > 1e9
    assert set(found["programs"]) == {"accumulate", "apply", "weights", "open", "prefill", "append", "decode"}
    assert found["programs"]["accumulate"]["splash_attention"] and found["programs"]["prefill"]["splash_attention"]
    assert not found["programs"]["decode"]["splash_attention"]
    assert found["collectives"] == found["programs"]["accumulate"]["collectives"]
    assert found["collectives"]["all-gather"]["count"] >= 7  # the linear layers of one decoder layer
    # The largest thing gathered is the table of 768 x 128 in fp32; the stack of a projection would be larger.
    assert found["programs"]["accumulate"]["largest_all_gather"] == 768 * 128 * 4


@pytest.mark.slow  # the compiler refuses only what is large
def test_one_that_is_refused_is_told_what_fits(tmp_path: Path) -> None:
    much = ["--config.grpo.groups=512", "--config.grpo.group_size=32", "--config.rollout.member_buckets=(128,1024)"]
    arguments = ["--config=configs/quickstart.py", "--topology=v5e:2x2", "--programs=update", *LENGTHS, *much]
    found, printed = run(tmp_path / "plan.json", *arguments, "--config.rollout.room=1024")
    assert not found["fits"] and found["programs"]["accumulate"]["refused"]
    assert found["per_chip"]["total"] > found["per_chip"]["limit"]
    assert found["nearest"] == {"grpo.microbatches": 128}
    assert '--config.grpo.microbatches="128"' in printed


def test_without_a_topology_it_plans_for_the_devices_at_hand(tmp_path: Path) -> None:
    found, printed = run(tmp_path / "plan.json", "--config=configs/quickstart.py", "--programs=update")
    assert found["fits"] and found["device"] == "cpu" and found["chips"] == jax.device_count()
    assert found["per_chip"]["total"] > 0 and "cpu" in printed


def test_gpus_are_estimated_and_it_says_so(tmp_path: Path) -> None:
    size = ["--config.grpo.microbatches=8"]
    found, printed = run(tmp_path / "plan.json", "--config=configs/qwen3_vl_4b.py", "--topology=h100:8", *size)
    assert found["estimated"] and "update (estimated)" in printed
    # fp32 masters and two moments of 4.4 billion parameters over eight devices.
    assert found["per_chip"]["arguments"] == pytest.approx(4_437_815_808 * 12 / 8, rel=2e-3)
    assert found["fits"]


@pytest.mark.parametrize(
    ("topology", "words"),
    [("v5e:7x9", "not a slice the TPU compiler knows"), ("h100:many", "how many? Write h100:8")],
)
def test_unknown_topologies_are_refused(topology: str, words: str) -> None:
    command = [sys.executable, "-m", "maestro_jax.plan", "--config=configs/quickstart.py", f"--topology={topology}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 78 and words in result.stderr and result.stderr.count("\n") == 1


def test_without_the_compiler_the_one_for_this_jax_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("INTERNAL: Failed to open libtpu.so: cannot open shared object file")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets the compiler's variables
    with pytest.raises(ConfigError, match=re.escape(f"run `pip install 'jax[tpu]=={jax.__version__}'`")):
        tpu_target("v5e:2x2")


def test_changes_begin_with_what_costs_least() -> None:
    raw = quickstart.get_config()
    raw.grpo.groups, raw.rollout.member_buckets, raw.rollout.room = 64, (40, 80), 80
    tried = list(changes(raw, devices=4))
    assert tried[0] == {"grpo.microbatches": 16}
    assert tried[1] == {"grpo.microbatches": 16, "policy.remat": True}
    assert tried[-1]["rollout.room"] == 40 and tried[-1]["policy.prefix_buckets"] == (48,)


def test_groups_that_do_not_divide_over_the_devices_come_first() -> None:
    raw = qwen3_vl_4b.get_config()
    raw.grpo.groups, raw.grpo.microbatches = 24, 1
    first = next(changes(raw, devices=16))
    assert first == {"grpo.groups": 32, "grpo.microbatches": 2, "evaluate.batch": 64}


def test_the_verdict_names_the_tightest_program() -> None:
    target = Target("four", (), "chip", 100, None, 4)
    programs = [Program(name, size, 0, 10, False, 0.0, {}, 0, False, 0.0) for name, size in (("a", 30), ("b", 65))]
    assert verdict(True, target, programs, {}) == (
        "fits: 25% of the memory of a chip stay free at the tightest program (b)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:8x8", "v5p:2x2x2", "v6e:4x4"])
def test_the_4b_policy_fits(topology: str, tmp_path: Path) -> None:
    """P = 4096, G = 8, R = 512; bf16 compute, fp32 masters and moments, one group a chip at a time."""
    chips = {"v5e:8x8": 64, "v5p:2x2x2": 8, "v6e:4x4": 16}[topology]
    sizes = [
        "--config.rollout.room=512",
        "--config.rollout.member_buckets=(512,)",
        f"--config.grpo.microbatches={64 // chips}",
    ]
    found, _ = run(tmp_path / "plan.json", "--config=configs/qwen3_vl_4b.py", f"--topology={topology}", *sizes)
    assert found["chips"] == chips
    assert found["fits"], found["per_chip"]
    update = found["programs"]["accumulate"]
    assert update["splash_attention"]
    # The table in bfloat16; the smallest stack of a large projection has 33 x 2560 x 1024 x 2 bytes a shard of heads.
    assert update["largest_all_gather"] <= 151_936 * 2560 * 2
