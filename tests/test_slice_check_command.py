"""`python -m maestro_jax.slice_check`: what does not divide over a slice is found before there is one."""

import os
import subprocess
import sys
from typing import Any

import pytest

from configs import quickstart, qwen3_vl_4b
from maestro_jax.aot.fit import fit
from maestro_jax.aot.slices import parse_accelerator
from maestro_jax.config import Config, parse_config
from maestro_jax.errors import ConfigError


def changed(raw: Any, **values: Any) -> Config:
    raw.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return parse_config(raw)


def test_the_command_says_one_line_and_touches_no_device() -> None:
    command = [sys.executable, "-m", "maestro_jax.slice_check", "--config=configs/qwen3_vl_4b.py"]
    elsewhere = {**os.environ, "JAX_PLATFORMS": "tpu"}  # a platform that is not here: asking for its devices fails
    result = subprocess.run(
        [*command, "--accelerator=v5litepod-64"], env=elsewhere, capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stdout) == (
        0,
        "v5litepod-64: 16 x 4 devices, mesh data=1 x fsdp=64 x tensor=1, groups of a batch shard: 1; "
        "memory: plan --topology=v5e:8x8\n",
    ), result.stderr[-2000:]


def test_the_command_names_the_cure_and_ends_with_78() -> None:
    command = [sys.executable, "-m", "maestro_jax.slice_check", "--config=configs/qwen3_vl_4b.py"]
    result = subprocess.run([*command, "--accelerator=v6e-256"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 78 and result.stderr.count("\n") == 1
    assert "config.grpo.groups=64 does not divide over 256 devices" in result.stderr
    assert result.stderr.rstrip().endswith("set it to a multiple of 256")


@pytest.mark.parametrize(
    ("accelerator", "values", "message"),
    [
        ("v5litepod-64", {"mesh__fsdp": 16}, r"needs 16 devices, found 64; set config.mesh.fsdp=-1"),
        ("v5litepod-64", {"mesh__tensor": 8}, r"does not divide the 4 devices of a process; set config.mesh.tensor to"),
        ("h100x8x2", {"mesh__tensor": 16}, r"does not divide the 8 devices of a process"),
        ("v5p-256", {"evaluate__batch": 128, "grpo__groups": 64}, r"config.grpo.groups=64 .* multiple of 128"),
        ("v5litepod-64", {"evaluate__batch": 48}, r"config.evaluate.batch=48 .* multiple of 64"),
        ("v5litepod-64", {"grpo__microbatches": 2}, r"config.grpo.groups / microbatches=32 .* multiple of 64"),
        ("v5litepod-64", {"rollout__append_rows": 32}, r"config.rollout.append_rows=32 .* multiple of 64"),
        ("v5litepod-64", {"rollout__lanes": 96}, r"config.rollout.lanes=96 .* multiple of 64"),
    ],
)
def test_what_does_not_divide(accelerator: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        fit(changed(qwen3_vl_4b.get_config(), **values), parse_accelerator(accelerator))
    assert "\n" not in str(caught.value)


def test_parameters_must_divide_too() -> None:
    config = changed(
        quickstart.get_config(), mesh__fsdp=5, grpo__groups=5, warm_start__groups=5, evaluate__batch=5,
        rollout__append_rows=5,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"does not divide over mesh axis fsdp=5; choose config.mesh.fsdp among"):
        fit(config, parse_accelerator("a100x5"))


def test_splash_attention_is_refused_for_gpus() -> None:
    config = changed(quickstart.get_config(), policy__attention="splash")
    with pytest.raises(ConfigError, match="needs a TPU, found gpu"):
        fit(config, parse_accelerator("h100x8"))
