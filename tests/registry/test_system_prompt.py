"""The system prompt: what it names and how short it is."""

from collections.abc import Callable
from typing import Any

from maestro_jax.registry.config import parse_registry
from maestro_jax.registry.prompt import render_system_prompt
from maestro_jax.rollout import protocol

Raw = Callable[..., dict[str, Any]]


def test_lists_experts_and_shown_skills_one_line_each(raw: Raw) -> None:
    ask = {"kind": "ask", "output": "a", "prompt": "x"}
    skills = (*raw()["skills"], {"name": "Hidden", "tier": 2, "stages": (ask,)})
    lines = render_system_prompt(parse_registry(raw(skills=skills)), 4).splitlines()
    listed = [line for line in lines if line.startswith("- ")]
    assert listed == [
        "- Echo-One: says it again",
        "- Echo-Two: says it again",
        "- Plain_Solver: asks once",
        "- Text_Solver: reads, then asks",
    ]


def test_shows_the_grammar_and_the_budget(raw: Raw) -> None:
    prompt = render_system_prompt(parse_registry(raw()), 4)
    assert f"{protocol.CALL_OPEN} Expert@@Skill: query {protocol.CALL_CLOSE}" in prompt
    assert protocol.wrap_observation("text") in prompt
    assert f"{protocol.ANSWER_OPEN} text {protocol.ANSWER_CLOSE}" in prompt
    assert "You have 4 calls" in prompt
    assert "You have one call." in render_system_prompt(parse_registry(raw()), 1)


def test_a_description_stays_on_its_line(raw: Raw) -> None:
    experts = ({**raw()["experts"][0], "description": "reads\n\n- Fake: text"},)
    assert "- Echo-One: reads - Fake: text\n" in render_system_prompt(parse_registry(raw(experts=experts)), 4)


def test_fixed_text_is_short(raw: Raw) -> None:
    rules = render_system_prompt(parse_registry(raw()), 4).split("\nExperts:")[0]
    assert len(rules.split()) <= 120
