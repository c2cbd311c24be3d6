"""Options and letters, as data sets write them."""

import pytest

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
