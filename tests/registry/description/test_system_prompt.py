"""The system prompt: what it names and how short it is."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.registry import suite
from maestro_jax.errors import ConfigError
from maestro_jax.registry.description.prompt import inline_prompt, render_system_prompt
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


# ---- a prompt that is given --------------------------------------------------------------------------------

# In the manner of published ones: names in other spellings, the form of a call, examples, braces of its own.
GIVEN = """
You plan. {"keep": "these {braces}"}
Models: [echo_one, ECHO-TWO]. Skills: 1. Plain Solver: asks. 2. Text_Solver.
Write <search> Model-Name@@Skill-Name:Your-Text </search>, as in
<search> Echo-One@@Plain_Solver: what is there? </search>\r
"""


def test_a_prompt_that_is_given_is_taken_as_it_is(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(GIVEN.encode())
    config = parse_registry(raw())
    assert render_system_prompt(config, 4, str(tmp_path / "prompt.txt")) == GIVEN
    inlined = inline_prompt(str(tmp_path / "prompt.txt"))
    (tmp_path / "prompt.txt").unlink()
    assert inline_prompt(inlined) == inlined and render_system_prompt(config, 4, inlined) == GIVEN


def test_places_take_the_lists_of_the_registry_once(raw: Raw) -> None:
    experts = ({**raw()["experts"][0], "description": "reads {skills}"}, raw()["experts"][1])
    config = parse_registry(raw(experts=experts))
    rendered = render_system_prompt(config, 4, "text:Ask\n{experts}\nby\n{skills}\n{other}")
    assert rendered == (
        "Ask\n- Echo-One: reads {skills}\n- Echo-Two: says it again\nby\n"
        "- Plain_Solver: asks once\n- Text_Solver: reads, then asks\n{other}"
    )


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("echo_one, ", "", "does not name the expert Echo-One"),
        ("ECHO-TWO", "ECHO-TWOFOLD", "does not name the expert Echo-Two, which the registry shows; .* {experts} .*"),
        ("Text_Solver", "Text", "does not name the skill Text_Solver"),
        ("Echo-One@@Plain", "Echo-Onne@@Plain", 'the call Echo-Onne@@Plain_Solver, .*: Unknown expert "Echo-Onne"'),
        ("One@@Plain_Solver", "One@@Model", 'the call Echo-One@@Model, which nobody answers: Unknown skill "Model"'),
    ],
)
def test_names_in_a_prompt_are_those_of_the_registry(raw: Raw, before: str, after: str, problem: str) -> None:
    text = GIVEN.replace("Echo-One@@Plain_Solver", "Echo-Two@@Plain_Solver") if before == "echo_one, " else GIVEN
    assert before in text
    with pytest.raises(ConfigError, match=f"config.policy.system_prompt: .*{problem}") as refused:
        render_system_prompt(parse_registry(raw()), 4, "text:" + text.replace(before, after))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "can't decode"),
        (b"a" * (2**20 + 1), "more than 1048576"),
    ],
)
def test_a_file_that_holds_no_prompt_is_refused(content: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} .*{problem}.*a relative path starts from "):
        inline_prompt(str(path))
