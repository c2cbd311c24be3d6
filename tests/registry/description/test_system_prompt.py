"""The system prompt: what it names and how short it is."""

import hashlib
from collections.abc import Callable
from typing import Any

from configs.registry import suite
from maestro_jax.registry.description.prompt import render_system_prompt
from maestro_jax.registry.description.reading import parse_registry
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


def test_price_and_speed_are_shown_where_the_registry_says_so(raw: Raw) -> None:
    experts = [{**expert, "typical_seconds": 2.5} for expert in raw()["experts"]]

    def shown(*show: str) -> str:
        config = parse_registry(raw(experts=experts, show=show))
        return next(line for line in render_system_prompt(config, 4).splitlines() if "Echo-One" in line)

    assert shown() == "- Echo-One: says it again"
    assert shown("price") == "- Echo-One: says it again ($1 in, $2 out per million tokens)"
    assert shown("speed", "price") == "- Echo-One: says it again (2.5 s; $1 in, $2 out per million tokens)"


def test_hidden_experts_are_not_listed(raw: Raw) -> None:
    experts = (raw()["experts"][0], {**raw()["experts"][1], "shown": False})
    assert "Echo-Two" not in render_system_prompt(parse_registry(raw(experts=experts)), 4)


def test_the_quickstarts_prompt_keeps_its_bytes() -> None:
    prompt = render_system_prompt(parse_registry(suite.get_registry()), 1)
    # Of the prompt that the figures in docs/quickstart.md were measured with.
    assert (
        hashlib.sha256(prompt.encode()).hexdigest()
        == "bcf7ed07780263abe99c4372745990fe251f121a5d7cf1f12801fd86c02d4c88"
    )
