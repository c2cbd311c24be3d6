"""The registry config: what is accepted, how names resolve, and how each mistake reads."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict  # type: ignore[import-untyped]

from maestro_jax.errors import ConfigError
from maestro_jax.plugins import load
from maestro_jax.registry.description.config import Pair
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.description.stages import AskStage, ServiceStage

Raw = Callable[..., dict[str, Any]]
ASK = {"kind": "ask", "output": "answer", "prompt": "{question}"}
OCR = {"kind": "service", "service": "ocr", "output": "ocr"}


def skill(name: str = "S", **fields: Any) -> dict[str, Any]:
    return {"name": name, "stages": (ASK,)} | fields


def parent(name: str, *children: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "children": children, **fields}


def test_parses_every_part(raw: Raw) -> None:
    config = parse_registry(raw())
    assert [e.name for e in config.experts] == ["Echo-One", "Echo-Two"]
    assert config.experts[0].price_completion == 2.0 and config.experts[1].options == {"mark": "two"}
    kinds = [type(stage) for stage in config.skills[1].stages]
    assert kinds == [ServiceStage, AskStage]


def test_config_dict_parses_like_a_dict(raw: Raw) -> None:
    assert parse_registry(ConfigDict(raw())) == parse_registry(raw())


def test_tier_two_is_hidden_unless_shown(raw: Raw) -> None:
    config = parse_registry(raw(skills=(skill("A"), skill("B", tier=2), skill("C", tier=2, shown=True))))
    assert [s.name for s in config.shown_skills] == ["A", "C"]


@pytest.mark.parametrize("written", ["Echo-One", "echo one", "ECHO_ONE", " echo-One "])
def test_names_resolve_after_normalisation(raw: Raw, written: str) -> None:
    assert parse_registry(raw()).resolve(written, "text-solver") == Pair("Echo-One", "Text_Solver")


@pytest.mark.parametrize("written", ["Echo", "Echo-One2", "EchoOne", "my Echo-One", ""])
def test_names_never_resolve_by_substring(raw: Raw, written: str) -> None:
    error = parse_registry(raw()).resolve(written, "Plain_Solver")
    assert error == f'Unknown expert "{written}". Experts: Echo-One, Echo-Two.'


def test_unknown_skill_lists_the_shown_ones(raw: Raw) -> None:
    config = parse_registry(raw(skills=(skill("A"), skill("Hidden", tier=2))))
    assert config.resolve("Echo-One", "Hidden") == 'Unknown skill "Hidden". Skills: A.'


def test_long_names_are_cut_in_the_error(raw: Raw) -> None:
    assert len(str(parse_registry(raw()).resolve("x" * 4000, "Plain_Solver"))) < 120


def test_restricted_skill_names_its_experts(raw: Raw) -> None:
    config = parse_registry(raw(skills=(skill("A", experts=("echo two",)),)))
    assert config.resolve("Echo-Two", "A") == Pair("Echo-Two", "A")
    assert config.resolve("Echo-One", "A") == "Echo-One cannot run A. Experts for it: Echo-Two."


def test_parent_needs_a_child_that_the_expert_may_run(raw: Raw) -> None:
    config = parse_registry(raw(skills=(parent("P", "C"), skill("C", tier=2, experts=("Echo-Two",)))))
    assert config.resolve("Echo-Two", "P") == Pair("Echo-Two", "P")
    assert "Experts for it: Echo-Two." in config.resolve("Echo-One", "P")


def test_braces_that_are_no_placeholder_stay(raw: Raw) -> None:
    parse_registry(raw(skills=(skill(stages=({**ASK, "prompt": 'JSON {"a": 1} {} { query }'},)),)))


MISTAKES = [
    ({"expert": ()}, "unknown key registry.expert; did you mean registry.experts?"),
    (
        {"experts": ()},
        "registry needs at least one shown expert and one shown skill; add them to registry.experts/skills",
    ),
    ({"experts": {"a": 1}}, "registry.experts must be a tuple of mappings, found dict"),
    ({"experts": ("x",)}, "registry.experts[0] must be a mapping of settings, found str"),
    (
        {"experts": ({"name": "A", "description": "", "implementatoin": "x"},)},
        'unknown key registry.experts["A"].implementatoin; did you mean registry.experts["A"].implementation?',
    ),
    ({"experts": ({"name": "A", "implementation": "m:C"},)}, 'registry.experts["A"] lacks "description"; add it'),
    (
        {"experts": ({"name": "A", "description": "", "implementation": "m:C", "timeout": "5"},)},
        "registry.experts[\"A\"].timeout must be a number of at least 0, found '5'",
    ),
    (
        {"experts": ({"name": "A", "description": "", "implementation": "fake_specialists:Echo", "timeout": 0},)},
        'expert "A": timeout must be above 0 seconds',
    ),
    (
        {"experts": ({"name": "A@@B", "description": "", "implementation": "m:C"},)},
        'expert name "A@@B" is empty or holds "@@", ":", "<", ">" or a line break; rename it',
    ),
    (
        {"skills": (skill(keywords="plot"),)},
        "registry.skills[\"S\"].keywords must be a tuple of texts, found 'plot'; a tuple of one needs a comma: "
        "('plot',)",
    ),
    ({"skills": ({"stages": (ASK,)},)}, 'registry.skills[0] lacks "name"; add it'),
    (
        {"skills": (skill("My-Skill"), skill("my_skill"))},
        'skill "my_skill" has the same name as "My-Skill" (case, "-", "_" and " " do not count); rename one',
    ),
    (
        {"skills": (skill(stages=({**OCR, "service": "orc"},)),)},
        'skill "S" stage 1 ("ocr"): unknown service "orc"; did you mean "ocr"?',
    ),
    (
        {"skills": (skill(stages=({**ASK, "prompt": "{qustion}"},)),)},
        'skill "S" stage 1 ("answer"): no earlier stage gives {qustion}; did you mean "question"?',
    ),
    (
        {"skills": (skill(stages=({**ASK, "prompt": "{ocr}"}, OCR)),)},
        'skill "S" stage 1 ("answer"): no earlier stage gives {ocr}; valid: question, query',
    ),
    (
        {"skills": (skill(stages=(OCR, {**ASK, "images": "orc"})),)},
        'skill "S" stage 2 ("answer"): no earlier stage gives images "orc"; did you mean "ocr"?',
    ),
    (
        {"skills": (skill(stages=(ASK, {**ASK, "output": "more", "images": "answer"})),)},
        'skill "S" stage 2 ("more"): "answer" gives text, needed is images; valid: task, none',
    ),
    (
        {"skills": (skill(stages=(ASK, ASK)),)},
        'skill "S" stage 2 ("answer"): the output name is taken or no identifier; choose another',
    ),
    (
        {"skills": (skill(stages=({"kind": "asks", "output": "a"},)),)},
        'registry.skills["S"].stages[0].kind must be one of "service", "ask", "parse", "crop", "draw", "run", '
        "found 'asks'",
    ),
    (
        {"skills": (skill(stages=({**ASK, "by": "type"},)),)},
        'skill "S" stage 1 ("answer") must have either "prompt", or "by" with "prompts"',
    ),
    (
        {"skills": (skill(stages=({"kind": "ask", "output": "a", "by": "type", "prompts": {"other": "x"}},)),)},
        'skill "S" stage 1 ("a"): no earlier stage gives {type}; valid: question, query',
    ),
    (
        {"skills": (skill(stages=(OCR, {"kind": "ask", "output": "a", "by": "ocr", "prompts": {"bar": "x"}})),)},
        'skill "S" stage 2 ("a"): prompts lack "other", used when no key matches; add it',
    ),
    ({"skills": ({"name": "S"},)}, 'skill "S" must have either stages or children, and not both'),
    ({"skills": (skill(tier=3, shown=True),)}, 'skill "S": tier must be 1 or 2, found 3'),
    (
        {"skills": (parent("P", "Chld"), skill("Child", tier=2))},
        'skill "P": unknown child "Chld"; did you mean "Child"?',
    ),
    ({"skills": (parent("P", "C"), skill("C"))}, 'skill "P": child "C" is of tier 1; set its tier to 2'),
    (
        {"skills": (skill("S"), parent("P", "Q", tier=2), parent("Q", "P", tier=2))},
        'skill "P": children form a cycle P -> Q -> P; remove one of them',
    ),
    (
        {"skills": (skill("X", experts=("Y",)),)},
        'skill "X" names expert "Y" that the registry does not have; '
        "add it to registry.experts or pick one of: Echo-One, Echo-Two",
    ),
    (
        {"services": ({"name": "ocr", "implementation": "no_such_module:C"},)},
        'service "ocr": implementation "no_such_module:C" does not import (ModuleNotFoundError: No module named '
        "'no_such_module'); write it as \"package.module:name\" and check that it is installed",
    ),
    (
        {"experts": ({"name": "A", "description": "", "implementation": "fake_specialists:not_a_class"},)},
        'expert "A": implementation "fake_specialists:not_a_class" is neither a class nor a function; '
        'write it as "package.module:name" and check that it is installed',
    ),
]


@pytest.mark.parametrize(("parts", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_each_mistake_is_one_line_with_its_cure(raw: Raw, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_registry(raw(**parts))
    assert str(caught.value) == message and "\n" not in message


def test_a_missing_package_of_the_suite_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("maestro_jax.suite.specialists")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match="the package cv2 is missing; install it with `pip install '.\\[suite\\]'`"):
        load("maestro_jax.suite.specialists.ocr:OcrService", 'service "ocr": implementation')


def test_an_opencv_that_wants_a_screen_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    (tmp_path / "wants_a_screen.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="pip uninstall opencv-python.*opencv-python-headless"):
        load("wants_a_screen:Service", 'service "ocr": implementation')
