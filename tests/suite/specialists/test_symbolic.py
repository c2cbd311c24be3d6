"""Sym-Solver on text blocks: what the words and labels determine, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists.prompting import UNKNOWN
from maestro_jax.suite.specialists.symbolic import SymSolver, evaluate, quantities


def ask(question: str, *labels: str) -> str:
    block = "".join(f"{label} @ 1,1,20,12\n" for label in labels)
    return SymSolver().answer([Message("user", f"Solve.\nText in the image:\n{block}Question: {question}\nFocus: x")])


@pytest.mark.parametrize(
    ("question", "labels", "answer"),
    [
        ("What is the missing angle of the triangle, in degrees?", ("99°", "66°", "?"), "15"),
        ("Find the unknown interior angle of the quadrilateral.", ("90", "1100", "80°"), "80"),
        ("What is the perimeter of the rectangle?", ("12 cm", "7cm"), "38"),
        ("What is the area of the rectangle?", ("12m", "7 m"), "84"),
        ("What is the area of the triangle?", ("5", "3"), "7.5"),
        ("How long is the hypotenuse?", ("3", "4", "?"), "5"),
        ("How long is the missing leg?", ("5", "?", "3"), "4"),
        ("Work out the expression shown.", ("57-87+40=?",), "10"),
    ],
)
def test_solves(question: str, labels: tuple[str, ...], answer: str) -> None:
    assert ask(question, *labels) == answer


@pytest.mark.parametrize(
    ("question", "labels"),
    [
        ("What is the missing angle of the pentagon?", ("99°", "66°")),  # OCR lost labels
        ("What is the area of the rectangle?", ()),
        ("How long is the hypotenuse?", ("3",)),
        ("Which month is the highest?", ("12", "7")),
        ("Work out the expression shown.", ("3 / 0",)),
    ],
)
def test_admits_what_is_not_determined(question: str, labels: tuple[str, ...]) -> None:
    assert ask(question, *labels) == UNKNOWN


def test_it_is_blind_without_a_text_block() -> None:
    assert SymSolver().answer([Message("user", "Question: What is the area of the rectangle?")]) == UNKNOWN


def test_quantities_skip_words() -> None:
    assert quantities(["a = 5", "Total", "12 cm", "40°", "7 apples"]) == [5, 12, 40]


@given(st.text(max_size=60))
def test_no_text_makes_it_raise(text: str) -> None:
    SymSolver().answer([Message("user", f"Text in the image:\n{text} @ 1,1,2,2\nQuestion: {text}")])


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_evaluate_follows_precedence(a: int, b: int, c: int) -> None:
    assert evaluate(f"{a} + {b} * {c}") == a + b * c
