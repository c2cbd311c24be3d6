"""Graders: what holds for all sources, their names, hostile answers. The families' tables are in tables/."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.errors import ConfigError
from maestro_jax.rewards import equations, graders, programs
from maestro_jax.rewards.graders import BUILT_IN, GRADERS, MAX_ANSWER_CHARS, Answer
from maestro_jax.rewards.reading import parse_number
from maestro_jax.types import Task

SAME_NUMBER = [  # right in every family but counting, where money and percent are no count
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("$1,234.50", "1234.5"),
    ("1234.5", "$1,234.50"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("\u22125", "-5"),
    ("\u20135", "-5"),
    ("\u20ac 12", "12"),
    ("12 \u20ac", "12"),
    ("1\u202f000", "1000"),
    ("1 000 000", "1,000,000"),
    ("88 %", "88"),
    ("88%", "88 %"),
    (".5", "0.5"),
    ("5.", "5"),
    ("+7", "7"),
    ("1e3", "1000"),
    ("1.5E-3", "0.0015"),
    ("0", "-0"),
    ("007", "7"),
    ("'42'", "42"),
    ("(42)", "42"),
    ("**42**", "42"),
    ("`42`.", "42"),
    ("\u201c42\u201d", "42"),
    ("42\n", " 42 "),
    ("The answer is 42.", "42"),
    ("the final answer: 42", "42"),
    ("Answer: 42", "42"),
    ("answer = 42", "42"),
    ("So, the answer is -3", "-3"),
]
NEVER_EQUAL = [  # wrong in every family
    ("-50", "50"),
    ("50", "-50"),
    ("1,00", "100"),
    ("10,00", "1000"),
    ("1,0000", "10000"),
    ("12 34", "1234"),
    ("10\u00b2", "102"),
    ("100 or 200", "100"),
    ("100 200", "100"),
    ("about 100", "100"),
    ("100 or so apples", "100"),
    ("50 + 50", "100"),
    ("2*50", "100"),
    ("10**2", "100"),
    ("1e2e0", "100"),
    ("--100", "100"),
    ("-$-100", "100"),
    ("$100\u20ac", "100"),
    ("0x64", "100"),
    ("about one hundred", "100"),
    ("one hundred or two", "100"),
    ("inf", "100"),
    ("nan", "nan1"),
    ("1e400", "1e401"),
    ("e", "Left lung"),
    ("left", "Left lung"),
    ("Left lung and right lung", "Left lung"),
    ("I do not know", "No"),
    ("no", "Now"),
    ("", "0"),
    ("   ", "0"),
    ("?", "!"),
    ("...", "no"),
    ("answer", "42"),
    ("the answer is", "42"),
    ("100\u0664", "1004"),
]
SAME_TEXT = [
    ("Red", "red"),
    ("RED.", "red"),
    ("  red \n", "red"),
    ('"red"', "red"),
    ("\u2018red\u2019", "red"),
    ("dark   blue", "dark blue"),
    ("dark\nblue", "dark blue"),
    ("The answer is red", "red"),
    ("Answer: Steven K. Duncan.", "steven k. duncan"),
    ("Go-Jek", "go-jek"),
    ("cafe\u0301", "caf\u00e9"),
    ("STRASSE", "stra\u00dfe"),
    ("(B)", "b"),
    ("?", "?"),
    ("answer", "Answer"),
    ("f(x)", "F(X)"),
    ("12:30", "12:30"),
]
DIFFERENT_TEXT = [
    ("red", "blue"),
    ("redish", "red"),
    ("red blue", "red"),
    ("Go Jek", "Go-Jek"),
    ("dark-blue", "dark blue"),
    ("yes", "no"),
    ("yes no", "yes"),
    ("12:30", "12:31"),
    ("1230", "12:30"),
    ("c#", "c"),
    ("c++", "c"),
    ("a & b", "a b"),
]
PLAIN = ("visual_qa", "reading", "counting", "charts", "geometry", "ChartQA")
NUMERIC_AND_TEXT = tuple(source for source in PLAIN if source != "counting")
READ = tuple(source for source in GRADERS if source != "HumanEval-V")  # whose answers are no programs


def open_sources(sources: Sequence[str]) -> None:
    BUILT_IN.open((source, "") for source in sources)


def verdict_of(source: str, answer: str, gold: Sequence[str]) -> float:
    return BUILT_IN.grade(Task("", "", (), tuple(gold), source), answer)


@pytest.mark.parametrize("source", NUMERIC_AND_TEXT)
@pytest.mark.parametrize(("answer", "gold"), SAME_NUMBER + SAME_TEXT)
def test_plain_formatting_is_forgiven(source: str, answer: str, gold: str) -> None:
    assert verdict_of(source, answer, [gold])


@pytest.mark.parametrize("source", PLAIN)
@pytest.mark.parametrize(("answer", "gold"), NEVER_EQUAL + DIFFERENT_TEXT)
def test_content_is_not_forgiven(source: str, answer: str, gold: str) -> None:
    assert not verdict_of(source, answer, [gold])


@pytest.mark.parametrize("source", ["visual_qa", "reading", "counting"])
@pytest.mark.parametrize(("answer", "gold"), [("3.5", "3.4999999"), ("103", "100"), ("4", "5"), ("1000", "1001")])
def test_exact_families_allow_no_tolerance(source: str, answer: str, gold: str) -> None:
    assert not verdict_of(source, answer, [gold])


def test_any_accepted_answer_counts() -> None:
    assert verdict_of("reading", "two", ["one", "Two"])
    assert not verdict_of("reading", "two", [])


@pytest.mark.parametrize("spelled", ["hrbench_4k", "HRBench-4K", "hrbench4k", "HRBENCH 4K"])
def test_names_of_sources_differ_by_case_and_hyphens_only(spelled: str) -> None:
    assert BUILT_IN.find(spelled) is GRADERS["HRBench-4K"]


def test_answers_are_graded_together_in_their_order() -> None:
    maths, chart = Task("", "", (), (r"\sqrt{8}",), "MathVision"), Task("", "", (), ("100",), "ChartQA")
    pairs = [(maths, r"2\sqrt{2}"), (chart, "106"), (maths, r"3\sqrt{2}"), (chart, "105"), (maths, r"2\sqrt{2}")]
    assert BUILT_IN.outcomes([Answer(*pair) for pair in pairs]) == [True, False, False, True, True]
    assert BUILT_IN.outcomes([]) == []


def test_sources_are_checked_before_a_run() -> None:
    open_sources(["charts", "MathVision", "chartqa"])
    with pytest.raises(ConfigError, match='no grader for source "riddles"'):
        open_sources(["charts", "riddles"])


def test_a_missing_package_is_named_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(kind: str) -> None:
        raise ConfigError('sandbox "bubblewrap" needs bwrap')

    monkeypatch.setattr(programs, "make_sandbox", missing)
    monkeypatch.setattr(graders, "_programs", programs.Programs("auto"))  # another test may have opened the other
    monkeypatch.setattr(equations.importlib.util, "find_spec", lambda name: None)
    open_sources(["SLAKE"])
    with pytest.raises(ConfigError, match=r"install math-verify"):
        open_sources(["SLAKE", "Geometry3K"])
    with pytest.raises(ConfigError, match=r"run in a sandbox; install maestro_jax\[sandbox\]"):
        open_sources(["SLAKE", "HumanEval-V"])


def test_an_unknown_source_names_the_known_ones() -> None:
    message = r'^no grader for source "chart"; known: visual_qa, .*ChartQA.*; name one in config.graders$'
    with pytest.raises(ConfigError, match=message):
        verdict_of("chart", "x", ["x"])
    with pytest.raises(ConfigError):
        BUILT_IN.find("")


HOSTILE = [
    "9" * 4096,
    "1e999999999",
    "1e" + "9" * 4000,
    "9,999" * 800,
    "1" + ",000" * 1000,
    "1" + " 000" * 1000,
    " " * 4096,
    "(" * 4096,
    "the answer is " * 290,
    "answer:" * 580,
    "-" * 4096,
    "0." + "0" * 4090 + "1",
    "\u0338" * 4000,
    "B, " * 1365,
    "?" + "," * 4000,
    "{5}{" * 1000,
    "5 rows " * 500,
    "yes, " * 800,
    "option " * 500,
    "```python\n" * 400,
    "\\text{" * 600,
    "\\boxed{1}" * 400,
    "__import__('os').system('id')",
    "\ud800",
    "\x00",
]


@pytest.mark.parametrize("source", READ)
def test_hostile_answers_are_cheap_and_wrong(source: str) -> None:
    start = time.process_time()
    assert not any(verdict_of(source, answer, ["100", "red"]) for answer in HOSTILE)
    assert time.process_time() - start < 0.5


def test_a_too_long_answer_is_wrong_even_if_padded_with_spaces() -> None:
    assert verdict_of("counting", "5" + " " * (MAX_ANSWER_CHARS - 1), ["5"])
    assert not verdict_of("counting", "5" + " " * MAX_ANSWER_CHARS, ["5"])


@given(st.sampled_from(READ), st.text(max_size=30), st.text(max_size=30))
def test_grading_never_raises(source: str, answer: str, gold: str) -> None:
    verdict_of(source, answer, [gold])


@given(st.sampled_from((*NUMERIC_AND_TEXT, "MathVision")), st.text(min_size=1, max_size=30).filter(str.strip))
def test_the_gold_answer_is_right(source: str, gold: str) -> None:
    assert verdict_of(source, gold, [gold])


@given(st.integers(-(10**12), 10**12))
def test_grouped_integers_are_themselves(value: int) -> None:
    number = parse_number(f"{value:,}")
    assert number is not None and number.value == value
