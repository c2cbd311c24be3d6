"""Configs at the boundary: shipped ones parse, and every mistake is one line that names the cure."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from maestro_jax.config import Config, base_config, complete, completed, parse_config
from maestro_jax.errors import ConfigError
from maestro_jax.grpo.update import FREEZABLE
from maestro_jax.parallel.mesh import MeshConfig, make_mesh
from maestro_jax.policy.attention.interface import BACKENDS
from maestro_jax.policy.config import PolicyConfig, architecture_from_hf
from maestro_jax.session.binding import check_same_run
from maestro_jax.session.rollouts import check_batches
from maestro_jax.settings import Settings, flatten

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
)


def with_value(key: str, value: Any) -> ConfigDict:
    """The quickstart with the setting at a dotted key replaced, whatever its type."""
    plain = quickstart.get_config().to_dict()
    *path, last = key.split(".")
    at = plain
    for part in path:
        at = at[part]
    at[last] = value
    return ConfigDict(plain)


def message(raw: Any) -> str:
    """The error of a wrong config, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_parses(name: str) -> None:
    config = parse_config(importlib.import_module(name).get_config())
    assert isinstance(config, Config)
    if config.policy.architecture:
        architecture_from_hf(config.policy.architecture, "config.policy.architecture")
    else:
        assert config.policy.init_from


def test_there_are_shipped_configs() -> None:
    assert {"configs.quickstart", "configs.qwen3_vl_2b", "configs.qwen3_vl_4b", "configs.qwen3_vl_8b"} <= set(SHIPPED)


def test_a_parsed_config_cannot_change() -> None:
    config = parse_config(quickstart.get_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.grpo.steps = 3  # type: ignore[misc]


def test_overrides_arrive() -> None:
    config = parse_config(with_value("grpo.group_size", 4))
    assert config.grpo.group_size == 4


def test_functions_of_ones_own_are_named_in_a_config_file() -> None:
    config = quickstart.get_config()
    config.data.kind = "tests.rewards.mine:open_tasks"  # needs no files
    config.graders = {"mine": "tests.rewards.mine:share_of_letters", "*": {"grader": "tests.rewards.mine:endless"}}
    config.reward.terms = {"brief": {"term": "tests.rewards.mine:brevity", "weight": -0.01}}
    parsed = parse_config(Settings.of(completed(config)).config)
    assert parsed.graders["*"] == {"grader": "tests.rewards.mine:endless"}
    assert parsed.reward.terms["brief"]["weight"] == -0.01


def test_whole_numbers_pass_as_fractions() -> None:
    assert parse_config(with_value("rollout.temperature", 1)).rollout.temperature == 1.0


def test_the_settings_of_a_run_hold_the_prompt_that_a_file_gave(tmp_path: Path) -> None:
    """So neither the file's place nor what becomes of it decides what a run goes on with."""
    (tmp_path / "prompt.txt").write_text("Ask.\n{experts}\n{skills}")
    raw = with_value("policy.system_prompt", str(tmp_path / "prompt.txt"))
    settings = Settings.of(completed(raw))
    assert settings.config["policy"]["system_prompt"] == "text:Ask.\n{experts}\n{skills}"
    settings.write(tmp_path / "config.json")
    (tmp_path / "prompt.txt").write_text("Ask well.\n{experts}\n{skills}" + "." * 1000)
    other = Settings.of(completed(raw))
    with pytest.raises(ConfigError, match="policy.system_prompt=.*Ask.*this one has .*Ask well") as refused:
        check_same_run(tmp_path / "config.json", other, lambda key: False)
    assert len(str(refused.value)) < 600
    (tmp_path / "prompt.txt").unlink()
    assert check_same_run(tmp_path / "config.json", settings, lambda key: False) == []
    with pytest.raises(ConfigError, match="prompt.txt cannot be read"):
        completed(raw)


# ---- unknown and missing keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("grpo.group_sze", "config.grpo.group_size"),
        ("seeed", "config.seed"),
        ("rollout.max_call", "config.rollout.max_calls"),
        ("warm_start.optimizer.learning_rat", "config.warm_start.optimizer.learning_rate"),
        ("mesh.tensors", "config.mesh.tensor"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    text = message(with_value(key, 1))
    assert f"unknown key config.{key}" in text and f"did you mean {nearest}?" in text


def test_an_unknown_key_unlike_all_others_lists_the_right_ones() -> None:
    text = message(with_value("checkpoint.zzz", 1))
    assert "config.checkpoint.zzz" in text and "every, keep" in text


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("every", 0, "config.checkpoint.every=0 saves nothing on the way; use 1 or more steps"),
        ("keep", -1, "config.checkpoint.keep=-1 is below 0; use 1 or more, or 0 to keep all"),
        ("keep_every", -10, "config.checkpoint.keep_every=-10 is below 0; use 1 or more steps, or 0 for none"),
        ("keep_every", 25, "config.checkpoint.keep_every=25 is no multiple of config.checkpoint.every=10"),
    ],
)
def test_checkpoints_that_cannot_be_kept_so(key: str, value: int, says: str) -> None:
    assert says in message(with_value(f"checkpoint.{key}", value))


def test_claims_of_a_warm_start_that_is_left_out_are_not_checked() -> None:
    raw = with_value("warm_start.claims", {"charts": ("Nobody", "Nothing")})
    assert "warm_start.claims.charts" in message(raw)
    raw.warm_start.steps = 0
    parse_config(raw)


@pytest.mark.parametrize("key", ["grpo.groups", "evaluate.batch", "warm_start.groups"])
def test_batches_must_divide_over_the_devices(key: str) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batches(parse_config(quickstart.get_config()), mesh)
    with pytest.raises(ConfigError, match=f"config.{key}=6 does not divide over 4 devices .* a multiple of 4"):
        check_batches(parse_config(with_value(key, 6)), mesh)


# ---- defaults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quickstart", "qwen3_vl_4b"])
def test_a_config_is_what_it_was_when_it_had_no_defaults(name: str) -> None:
    """Against the settings that the files of version 0.1 spelled out."""
    before: dict[str, str] = json.loads((ROOT / "tests/settings_before_defaults.json").read_text())[name]
    now = flatten(complete(importlib.import_module(f"configs.{name}").get_config()).to_dict())
    other = {key for key, value in before.items() if now.get(key) != value}
    if name == "qwen3_vl_4b":  # samples in bf16 with another kernel than it trains with
        assert now["grpo.importance_cap"] == "2.0"
        other.discard("grpo.importance_cap")
    if now["warm_start.steps"] == "0":  # the 4B had those of the quickstart's, which would have ruined it
        other = {key for key in other if not key.startswith("warm_start.")}
    assert not other and len(before) > 50


def test_what_a_config_leaves_out_has_its_default() -> None:
    raw = quickstart.get_config()
    whole, partial = parse_config(raw), raw.to_dict()
    del partial["mesh"], partial["rollout"]["patience"]
    assert parse_config(partial) == parse_config(ConfigDict(partial)) == whole
    assert complete(ConfigDict(partial)).to_dict() == raw.to_dict() | {"registry": complete(raw).registry.to_dict()}


def test_completing_keeps_what_is_given_and_what_refers_to_it() -> None:
    raw = ConfigDict({"grpo": {"steps": 7, "kl_weight": 1}, "mine": 3})
    raw.optimizer = {"decay_steps": raw.grpo.get_ref("steps")}
    complete(raw)
    assert (raw.mine, raw.grpo.steps, raw.grpo.group_size) == (3, 7, Config().grpo.group_size)
    assert repr(raw.grpo.kl_weight) == "1.0"  # a flag may set it to a fraction
    raw.grpo.steps = 9
    assert raw.optimizer.decay_steps == 9


def test_every_default_has_a_type_that_a_flag_can_set() -> None:
    def check(values: Any, where: str) -> None:
        for key, value in values.items():
            assert isinstance(value, bool | int | float | str | tuple | ConfigDict), f"{where}.{key}"
            if isinstance(value, ConfigDict):
                check(value, f"{where}.{key}")

    check(base_config(), "config")


def test_a_misspelt_setting_is_an_error_where_it_is_set() -> None:
    config = base_config()
    with pytest.raises(AttributeError, match='Did you mean "groups"'):
        config.grpo.gruops = 16
    config.policy.architecture.text_config = {"vocab_size": 768}  # its keys are not ours
    assert base_config().policy.architecture == ConfigDict()


def test_names_that_settings_may_have_are_those_of_the_code() -> None:
    hints = get_type_hints(PolicyConfig)
    assert get_args(hints["attention"]) == ("auto", *BACKENDS)
    assert get_args(get_args(hints["freeze"])[0]) == tuple(FREEZABLE)


# ---- types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("grpo.steps", "many", "config.grpo.steps must be an integer, found 'many'"),
        ("grpo.steps", 1.5, "config.grpo.steps must be an integer, found 1.5"),
        ("grpo.steps", True, "config.grpo.steps must be an integer, found True"),
        ("reward.require_call", 1, "config.reward.require_call must be True or False, found 1"),
        ("optimizer.learning_rate", "1e-4", "config.optimizer.learning_rate must be a number, found '1e-4'"),
        ("rollout.member_buckets", 128, "must be a tuple of integers, found 128; a tuple of one needs a comma: (128,)"),
        ("rollout.member_buckets", (64, "128"), "config.rollout.member_buckets[1] must be an integer, found '128'"),
        ("policy.tokenizer", None, "config.policy.tokenizer must be a text, found None"),
        ("policy.architecture", "4B", "config.policy.architecture must be a mapping, found '4B'"),
        ("mesh", 8, "config.mesh must be a mapping of settings, found int"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(key: str, value: Any, says: str) -> None:
    assert says in message(with_value(key, value))


# ---- names -------------------------------------------------------------------------------------------------


def test_an_unknown_expert_in_a_skill_lists_the_known_ones() -> None:
    registry = quickstart.get_config().registry.to_dict()
    registry["skills"] = tuple(
        {**skill, "experts": ("Chart-Lense",)} if skill["name"] == "Chart_Problem_Solver" else skill
        for skill in registry["skills"]
    )
    text = message(with_value("registry", registry))
    assert 'skill "Chart_Problem_Solver" names expert "Chart-Lense"' in text
    assert "add it to registry.experts" in text and "Chart-Lens," in text


def test_an_unknown_expert_in_the_claims_lists_the_known_ones() -> None:
    text = message(with_value("warm_start.claims.charts", ("Chart-Lense", "Chart_Problem_Solver")))
    assert "config.warm_start.claims.charts" in text
    assert 'Unknown expert "Chart-Lense"' in text and "Chart-Lens," in text


def test_a_claim_is_an_expert_and_a_skill() -> None:
    text = message(with_value("warm_start.claims.charts", ("Chart-Lens",)))
    assert "config.warm_start.claims.charts" in text and "write (expert, skill)" in text


def test_an_unknown_skill_in_the_claims_lists_the_known_ones() -> None:
    text = message(with_value("warm_start.claims.charts", ("Chart-Lens", "Chart_Solver")))
    assert 'Unknown skill "Chart_Solver"' in text and "Chart_Problem_Solver" in text


def test_queries_of_a_misspelt_skill_name_the_nearest() -> None:
    raw = quickstart.get_config()
    raw.warm_start.queries = ConfigDict({"Chart_Problem_Solvr": ("read the chart",)})
    text = message(raw)
    assert "config.warm_start.queries.Chart_Problem_Solvr is no skill" in text
    assert "did you mean Chart_Problem_Solver?" in text
    raw.warm_start.steps = 0
    parse_config(raw)


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("batch", 0), ("tasks", -1)])
def test_an_evaluation_of_nothing_is_refused(key: str, value: int) -> None:
    assert f"config.evaluate.{key}={value} is too small; use " in message(with_value(f"evaluate.{key}", value))


# ---- settings that contradict each other -------------------------------------------------------------------

PART = {"kind": "verl", "files": ("a.parquet",), "split": "", "image_root": "", "weight": 1}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data.kind", "parquet", "use one of suite, tfds, verl, jsonl"),
        ("data.kind", "nobody.knows:it", 'config.data.kind "nobody.knows:it" does not import (ModuleNotFoundError'),
        ("data.mixture", ({**PART, "kind": "nobody:it"},), 'config.data.mixture[0].kind "nobody:it" does not import'),
        ("graders", {"words": "nobody.knows:it"}, 'config.graders.words "nobody.knows:it" does not import'),
        ("graders", {"words": {"judge": "Nobody"}}, 'config.graders.words.judge "Nobody" is no expert of the registry'),
        ("graders", {"words": {"judge": "Tally"}}, '"Tally" can be called by the policy'),
        ("reward.terms", {"brief": {"term": "nobody:it", "weight": 1.0}}, 'config.reward.terms.brief "nobody:it" does'),
        ("data.kind", "verl", "needs config.data.train_files and config.data.test_files"),
        ("data.kind", "jsonl", '"jsonl" needs config.data.train_files and config.data.test_files'),
        (
            "data.mixture",
            ({**PART, "kind": "suite"},),
            "mixture[0].kind 'suite' is unknown; use one of tfds",
        ),
        ("data.mixture", (PART, {**PART, "weight": 0}), "mixture[1].weight=0.0 draws nothing"),
        ("data.mixture", ({**PART, "files": ()},), "mixture[0].files is empty; name the files"),
        ("rollout.member_buckets", (0, 96), r"member_buckets (0, 96) are lengths in tokens; use 1 or more"),
        ("rollout.room", -1, "config.rollout.room=-1 is below 0; set it to 0, and it is computed"),
        ("grpo.logprob_chunk", 0, "use 1 or more entries of the vocabulary"),
        ("policy.attention", "flash", "use one of auto, blocks, splash"),
        ("rollout.room", 32, "config.rollout.turn_budget=32 must be below room=32"),
        ("grpo.group_size", 1, "use at least 2"),
        ("grpo.refill", -1, "use 1 or more, or 0 to replace no group"),
        ("grpo.microbatches", 3, "must divide config.grpo.groups=16"),
        ("grpo.advantage", "zscore", "use one of "),
        ("policy.architecture", {}, "set config.policy.init_from"),
        ("policy.freeze", ("tower",), "freeze[0] 'tower' is unknown; use one of vision, embeddings"),
        ("policy.compute_dtype", "bf16", "use one of float32, bfloat16"),
        ("policy.matmul_precision", "high", "use one of auto, default, highest"),
        ("grpo.aggregation", "mean", "use one of "),
        ("grpo.kl_estimator", "k4", "use one of "),
        ("grpo.surrogate", "gpso", "use one of ppo, gspo, cispo"),
        ("rollout.temperature", 0.0, "config.rollout.temperature=0.0 divides the logits; use a number above 0"),
        ("rollout.temperature", float("nan"), "use a number above 0"),
        ("policy.param_dtype", "bfloat16", 'set param_dtype="float32"'),
        ("optimizer.max_skipped", 0, "config.optimizer.max_skipped=0 skips no update; use 1 or more"),
        ("warm_start.optimizer.eps", 0.0, "config.warm_start.optimizer.eps=0.0 divides 0 by 0"),
        ("grpo.clip_low", -0.2, "use 0 or more"),
        ("grpo.clip_high", -0.2, "use 0 or more"),
        ("grpo.importance_cap", 0.5, "use 1 or more"),
        ("grpo.importance_cap", -1.0, "use 1 or more"),
        ("grpo.steps", 10_000, "set config.optimizer.decay_steps=10000"),
        ("warm_start.steps", 10_000, "set config.warm_start.optimizer.decay_steps=10000"),
        ("optimizer.decay_steps", 2, "must exceed warmup_steps="),
        ("optimizer.moments", "fp8", "use one of float32, bfloat16, int8"),
        ("warm_start.optimizer.moments", "int4", "config.warm_start.optimizer.moments 'int4' is unknown"),
    ],
)
def test_a_contradiction_names_the_cure(key: str, value: Any, says: str) -> None:
    text = message(with_value(key, value))
    assert says in text and f"config.{key.split('.')[0]}." in text


def test_products_of_bfloat16_have_one_precision() -> None:
    raw = with_value("policy.matmul_precision", "highest")  # the quickstart computes in float32
    parse_config(raw)
    raw.policy.compute_dtype = "bfloat16"
    assert 'set compute_dtype="float32", or matmul_precision="auto"' in message(raw)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"grpo.stream": True}, "set stream=False or refill=0"),
        ({"rollout.ahead": 1, "rollout.staleness": 1, "grpo.importance_cap": 2.0}, "set refill=0 or ahead=0"),
    ],
)
def test_groups_are_replaced_only_where_a_step_is_a_whole(others: dict[str, Any], says: str) -> None:
    plain = with_value("grpo.refill", 1)
    parse_config(plain)
    plain.update_from_flattened_dict(others)
    assert says in message(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("warm_start.claims", {"charts": ("Nobody", "Nothing")}),
        ("warm_start.steps", 10_000),
        ("optimizer.decay_steps", 2),
        ("grpo.group_size", 1),
        ("checkpoint.every", 0),
        ("policy.param_dtype", "bfloat16"),
        ("rollout.ahead", 1),
        ("data.mixture", ({**PART, "weight": 0},)),
    ],
)
def test_settings_that_only_training_uses_are_checked_for_training_only(key: str, value: Any) -> None:
    raw = with_value(key, value)
    message(raw)
    parse_config(raw, trains=False)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rollout.turn_budget", 0, "decodes nothing"),
        ("rollout.room", 32, "must be below room="),
        ("rollout.temperature", 0, "use a number above 0"),
        ("data.kind", "jsonl", '"jsonl" needs config.data.test_files'),
        ("policy.attention", "flash", "use one of auto, blocks, splash"),
    ],
)
def test_settings_that_an_evaluation_uses_are_checked(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(with_value(key, value), trains=False)


def test_training_files_beside_a_mixture_are_refused() -> None:
    config = with_value("data.mixture", (PART,))
    config.data.train_files = ("train.parquet",)
    assert "config.data.train_files is not read beside config.data.mixture" in message(config)


def test_a_constant_length_of_zero_names_the_cure() -> None:
    config = with_value("grpo.aggregation", "constant")
    config.grpo.constant_length = 0
    assert "config.grpo.aggregation" in (text := message(config)) and "as config.rollout.room" in text


def test_parameters_in_bfloat16_are_trained_where_updates_move_them() -> None:
    """Whether they do is what rounding says: 1, and smaller numbers, must change both ways."""
    config = with_value("policy.param_dtype", "bfloat16")
    config.warm_start.optimizer.learning_rate = 1e-4
    config.optimizer.learning_rate = 2.0**-8
    assert "rounds updates of config.warm_start.optimizer.learning_rate=0.0001 away" in message(config)
    config.warm_start.steps = 0
    rate = np.float32(parse_config(config).optimizer.learning_rate)
    for size in (1.0, 0.02):
        weight = jnp.asarray(size, jnp.bfloat16)
        assert (weight + 1.01 * rate).astype(jnp.bfloat16) > weight > (weight - 1.01 * rate).astype(jnp.bfloat16)
        assert (weight + rate / 1024).astype(jnp.bfloat16) == weight


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "cispo"])
def test_published_clip_ranges_pass(surrogate: str) -> None:
    config = with_value("grpo.surrogate", surrogate)
    config.grpo.update({"clip_low": 10.0, "clip_high": 4e-4, "importance_cap": 2.0})  # CISPO's low, GSPO's high
    assert parse_config(config).grpo.surrogate == surrogate


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "needs 3 devices, found 8; set config.mesh.fsdp=-1"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "one axis may be -1"),
        ({"data": 1, "fsdp": -1, "tensor": 3}, "divisors of 8"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_cure(mesh: dict[str, int], says: str) -> None:
    config = parse_config(with_value("mesh", mesh))
    with pytest.raises(ConfigError) as caught:
        make_mesh(config.mesh)
    assert says in str(caught.value) and "\n" not in str(caught.value)
