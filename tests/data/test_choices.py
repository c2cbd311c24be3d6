"""Options and letters, as data sets write them."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_jax.data.choices import letter_of, split_options, with_options


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("What?\n(A) rubber\n(B) wool\nAnswer with the letter.", "What?", ("rubber", "wool")),
        ("What? A. go up. B. go down.", "What?", ("go up.", "go down.")),
        ("What?\nA: one\nB: two\nC: three", "What?", ("one", "two", "three")),
        ("Ask A. Smith.\nA. one\nB. two", "Ask A. Smith.", ("one", "two")),
        ("What is in Fig. A. or in Fig. C. here?", "What is in Fig. A. or in Fig. C. here?", ()),
        ("(A) Map. (B) Height. Which?\nA. rain\nB. snow", "(A) Map. (B) Height. Which?", ("rain", "snow")),
        ("(A) Map. (B) Height. Which? A. rain B. snow", "(A) Map. (B) Height. Which?", ("rain", "snow")),
        ("no options", "no options", ()),
    ],
)
def test_options_in_a_question(text: str, question: str, options: tuple[str, ...]) -> None:
    assert split_options(text) == (question, options)


def test_options_below_a_question_are_found_again() -> None:
    choices = ("12 cm", "x. y", "A")
    shown = with_options("How long?", choices)
    assert shown == "How long?\nA. 12 cm\nB. x. y\nC. A"
    assert split_options(shown) == ("How long?", choices)


def test_options_that_stand_in_the_picture_are_not_repeated() -> None:
    assert with_options("Which?", ("A", "B", "C")) == "Which?"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B. wool", "B"),
        ("wool", "B"),
        ("B: silk", None),
        ("D", None),
        ("w", None),
    ],
)
def test_gold_answers_as_letters(answer: str, letter: str | None) -> None:
    assert letter_of(answer, ("rubber", "wool", "glass")) == letter


def test_a_letter_that_is_also_another_option_is_ambiguous() -> None:
    assert letter_of("A", ("B", "A")) is None
    assert letter_of("A", ("A", "B")) == "A"


# One line each, as options are, and no bare letters, which stand in the picture.
LINES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1)
OPTIONS = LINES.map(str.strip).filter(lambda text: text and text not in string.ascii_uppercase)


@given(choices=st.lists(OPTIONS, min_size=2, max_size=26, unique=True))
def test_any_options_are_found_again_by_text_and_letter(choices: list[str]) -> None:
    assert split_options(with_options("Which of them?", choices)) == ("Which of them?", tuple(choices))
    for letter, choice in zip(string.ascii_uppercase, choices, strict=False):
        assert letter_of(letter, choices) == letter
        assert letter_of(choice, choices) in (letter, None)  # an option such as "B. x" says another letter


@given(text=st.text(), answer=st.text())
def test_any_text_can_be_asked(text: str, answer: str) -> None:
    question, options = split_options(text)
    assert len(options) != 1 and len(question) <= len(text)
    assert letter_of(answer, options) in (None, *string.ascii_uppercase[: len(options)])
