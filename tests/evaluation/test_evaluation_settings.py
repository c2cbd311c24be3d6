"""The settings of an evaluation: the run's, and what the command says otherwise."""

from typing import Any

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.evaluation.settings import Difference, changed_lines, combine, differences, ignored_lines, overridden

RUN: dict[str, Any] = {
    "seed": 1,
    "data": {"kind": "suite", "test_per_domain": 5},
    "policy": {"max_pixels": 100, "architecture": {"text_config": {"hidden_size": 64}}},
    "rollout": {"max_calls": 3, "turn_budget": 24},
    "registry": {"experts": ("A",)},
    "graders": {},
    "evaluate": {"batch": 5},
    "mesh": {"fsdp": 4},
    "warm_start": {"claims": {"charts": ("A", "S")}},
}
FILE: dict[str, Any] = {
    "seed": 0,
    "data": {"kind": "jsonl", "test_per_domain": 50},
    "policy": {"max_pixels": 200, "architecture": {"text_config": {"hidden_size": 128}}},
    "rollout": {"max_calls": 1, "turn_budget": 32},
    "registry": {"experts": ("B",)},
    "graders": {"gauges": "ChartQA"},
    "evaluate": {"batch": 64},
    "mesh": {"fsdp": -1},
    "warm_start": {"claims": {"charts": ("B", "S")}},
}


def test_the_runs_settings_count_and_a_file_says_which_tasks_graders_and_experts() -> None:
    given = ("data", "graders", "registry", "evaluate", "mesh")
    assert combine(RUN, FILE, ()) == RUN | {group: FILE[group] for group in given}
    assert combine(RUN, RUN, ()) == RUN


def test_an_override_counts_whatever_its_key() -> None:
    keys = ("rollout.max_calls", "policy.architecture.text_config.hidden_size", "registry.experts[0]", "seed")
    used = combine(RUN, FILE, keys)
    assert (used["rollout"], used["seed"]) == ({"max_calls": 1, "turn_budget": 24}, 0)
    assert used["policy"] == {"max_pixels": 100, "architecture": {"text_config": {"hidden_size": 128}}}
    assert RUN["rollout"]["max_calls"] == 3 and RUN["policy"]["architecture"]["text_config"]["hidden_size"] == 64


def test_differences_are_those_of_settings_in_use() -> None:
    run = {"rollout.max_calls": "3", "grpo.steps": "8", "data.kind": "'suite'", "registry.experts.A.price": "1.0"}
    here = {"rollout.max_calls": "1", "grpo.steps": "80", "data.kind": "'suite'"}
    found = differences(run, here, lambda key: not key.startswith("grpo."))
    assert found == {
        "rollout.max_calls": Difference("3", "1"),
        "registry.experts.A.price": Difference("1.0", "(not set)"),
    }
    assert changed_lines(found)[1] == "config.rollout.max_calls is 1 here; the run had 3"
    assert ignored_lines(found)[1] == (
        "config.rollout.max_calls of --config does not count (1): the run had 3; to change it, give "
        "--config.rollout.max_calls"
    )


def test_a_line_is_short() -> None:
    (line,) = changed_lines({"policy.architecture": Difference("x" * 1000, "y" * 1000)})
    assert len(line) < 300


def test_a_file_may_hold_some_of_the_groups_only() -> None:
    used = combine(RUN, FILE, ["evaluate.batch"], ["data", "registry", "rollout"])
    assert used == RUN | {"data": FILE["data"], "registry": FILE["registry"], "evaluate": {"batch": 64}}


def test_overrides_reach_into_lists() -> None:
    """As the command line has them; they were split at dots only."""
    settings = {"seed": 0, "registry": {"experts": ({"name": "A", "price": 1.0}, {"name": "B"})}}
    changed = overridden(settings, {"registry.experts[1].price": 2.0, "mesh.data": 8})
    assert changed["registry"]["experts"] == ({"name": "A", "price": 1.0}, {"name": "B", "price": 2.0})
    assert changed["mesh"] == {"data": 8} and settings["registry"]["experts"][1] == {"name": "B"}
    for key in ("registry.experts[2].price", "seed.x", "registry.experts[a].price"):
        with pytest.raises(ConfigError, match="names no setting"):
            overridden(settings, {key: 1})
