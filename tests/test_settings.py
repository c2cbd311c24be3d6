"""Settings as a file: nothing is lost, and the file is a config like another."""

import collections
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import quickstart
from maestro_jax.command import _ConfigParser
from maestro_jax.config import base_config, complete, parse_config
from maestro_jax.errors import EXIT_CONFIG, ConfigError
from maestro_jax.settings import Settings, flatten, read_settings
from tests.test_run_config import SHIPPED

ROOT = Path(__file__).parents[1]
GIVEN = [(name, ()) for name in SHIPPED] + [("configs.maestro_4b", ("out_of_domain",))]


def again(raw: Any, path: Path) -> dict[str, Any]:
    """What a file gives back."""
    Settings.of(raw).write(path)
    found = read_settings(path)
    assert found is not None
    return found.config


@pytest.mark.parametrize(("name", "arguments"), GIVEN)
def test_a_shipped_config_comes_back_as_it_was(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    raw = importlib.import_module(name).get_config(*arguments)
    back = ConfigDict(again(raw, tmp_path / "config.json"))
    # By their printed form: 1, 1.0 and True are equal, and so are mappings in another order.
    assert repr(back.to_dict()) == repr(raw.to_dict())
    assert parse_config(back) == parse_config(raw)


VALUES = {
    "none": None,
    "small": 1e-7,
    "third": 1 / 3,
    "infinite": math.inf,
    "whole": 2.0,
    "number": 2,
    "truth": True,
    "empty": (),
    "one": ("a",),
    "list": [1, (2, [3])],
    "of mappings": ({"z": 1, "a": {"y": (1,), "b": None}},),
    "keys": {0: "cat", 1: "dog", "$list": 3},
    "text": 'quoted "ü" \ud800\n{"$list": []}',
    "nothing": {},
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_keeps_its_type_and_its_order(name: str, tmp_path: Path) -> None:
    found = again({"group": {name: VALUES[name]}}, tmp_path / "config.json")
    assert repr(found) == repr({"group": {name: VALUES[name]}})


def test_a_nan_stays_one(tmp_path: Path) -> None:
    assert math.isnan(again({"a": math.nan}, tmp_path / "config.json")["a"])


def test_subclasses_are_compared_as_the_file_has_them(tmp_path: Path) -> None:
    point = collections.namedtuple("point", "x y")(1, 2)
    settings = Settings.of({"a": point})
    settings.write(tmp_path / "config.json")
    found = read_settings(tmp_path / "config.json")
    assert found is not None and found.flat == settings.flat == {"a": "(1, 2)"}


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", Path("p"), object()])
def test_what_no_file_can_hold_is_refused(value: Any) -> None:
    where = f"config.registry.options[1] is a {type(value).__name__}, which the run's config.json cannot hold"
    with pytest.raises(ConfigError, match=re.escape(where)):
        Settings.of({"registry": {"options": (1, value)}})


def test_flags_of_the_command_are_kept_beside_the_config(tmp_path: Path) -> None:
    Settings.of({"seed": 0}, {"--tasks": "3"}).write(tmp_path / "config.json")
    found = read_settings(tmp_path / "config.json")
    assert found == Settings({"seed": 0}, {"--tasks": "3"}) and found.flat == {"seed": "0", "--tasks": "3"}
    assert read_settings(tmp_path / "none.json") is None


def test_a_file_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"data.kind": "'suite'", "seed": "0"}))
    with pytest.raises(ConfigError, match=f"{path} is no config.json of this version, .*; take the version"):
        read_settings(path)


# ---- as --config -------------------------------------------------------------------------------------------


def check(config: Path | str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The cheapest command that reads a whole config."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "maestro_jax.slice_check", f"--config={config}", "--accelerator=v5litepod-8"]
    return subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_written_config_is_a_config_that_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "config.json"
    path.parent.mkdir()
    raw = quickstart.get_config()
    raw.evaluate.batch = 65
    Settings.of(raw, {"--tasks": "0"}).write(path)
    result = check(path)
    assert result.returncode == EXIT_CONFIG and "config.evaluate.batch=65 does not divide" in result.stderr
    result = check(path, "--config.evaluate.batch=64", "--config.rollout.member_buckets=(40, 80)")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.grpo.group_sze=4", "unknown key config.grpo.group_sze; did you mean"),
        ("--config.grpo.group_size=four", "grpo.group_size"),
        ("--config=nowhere/config.json", "there is no nowhere/config.json; check --config"),
    ],
)
def test_mistakes_are_refused_as_with_a_python_file(flag: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    Settings.of(quickstart.get_config()).write(path)
    result = check(path, flag)
    assert result.returncode == EXIT_CONFIG and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_unknown_group_in_the_file_is_refused(tmp_path: Path) -> None:
    raw = quickstart.get_config().to_dict()
    Settings.of(raw | {"grp": raw["grpo"]}).write(tmp_path / "config.json")
    result = check(tmp_path / "config.json")
    assert result.returncode == EXIT_CONFIG and "unknown key config.grp; did you mean" in result.stderr


def test_a_file_without_the_settings_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "architecture.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(ConfigError, match="architecture.json holds no settings of a run; name the config.json"):
        _ConfigParser(complete).parse(str(tmp_path / "architecture.json"))


# ---- --print_config ----------------------------------------------------------------------------------------


def test_the_whole_config_is_printed_with_its_defaults(tmp_path: Path) -> None:
    """Of a file that sets one key; what it prints are settings as `flatten` has them, and nothing is done."""
    path = tmp_path / "mine.py"
    path.write_text("from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'seed': 4})\n")
    flags = ["--print_config", "--config.policy.freeze=('vision',)", "--config.registry.limits.price=2"]
    (tmp_path / "jax.py").write_text("raise ImportError('nothing here needs jax')\n")
    command = [sys.executable, "-m", "maestro_jax.train", f"--config={path}", *flags]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stderr
    whole = base_config()
    whole.seed, whole.policy.freeze, whole.registry.limits.price = 4, ("vision",), 2.0
    assert result.stdout.splitlines() == sorted(f"config.{k} = {v}" for k, v in flatten(whole.to_dict()).items())
