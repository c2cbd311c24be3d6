"""Multiple choice: options and their letters, in question texts and out of them."""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase

# "A. ", "B) ", "(C) " or "D: " at the beginning of a line or behind a space.
_MARKER = re.compile(r"(?:(?<=\s)|^)\(?([A-Z])[.):]\s+", re.MULTILINE)


def with_options(question: str, choices: Sequence[str]) -> str:
    """The question with a line "A. text" for every option.

    Options that are only their letters ("A" to "E") stand in the picture and are not written again, as the authors of
    MathVision do (mathllm/MATH-V, models/GPT4V.py).
    """
    if list(choices) == list(LETTERS[: len(choices)]):
        return question
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines])


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question that holds its options, as (question, options); no options if it holds fewer than two.

    Options on lines of their own end with the line; options within a line end where the next one begins.
    """
    markers: list[re.Match[str]] = []
    for match in _MARKER.finditer(text):
        if match[1] == "A":
            if len(markers) < 2:  # an "A." before was no option
                markers = [match]
        elif markers and match[1] == LETTERS[len(markers) % len(LETTERS)]:
            markers.append(match)
    if len(markers) < 2:
        return text.strip(), ()
    ends = [*(match.start() for match in markers[1:]), len(text)]
    options = [text[match.end() : end].strip() for match, end in zip(markers, ends, strict=True)]
    if all(_begins_line(text, match.start()) for match in markers):
        options = [option.split("\n", 1)[0].strip() for option in options]
    return text[: markers[0].start()].strip(), tuple(options)


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of a gold answer that is written as a letter ("B", "(b)", "B. text") or as the text of an option.

    Returns:
      None if it is neither, or if letter and text point to different options.
    """
    said = answer.strip()
    by_text = [LETTERS[i] for i, choice in enumerate(choices) if choice.strip() == said]
    match = re.fullmatch(r"\(?([A-Za-z])(?:\)|[.:)]\s*(.*))?", said, re.DOTALL)
    letter = match[1].upper() if match and LETTERS.index(match[1].upper()) < len(choices) else None
    if letter and match and match[2] and match[2].strip() != choices[LETTERS.index(letter)].strip():
        letter = None
    if letter and by_text and by_text != [letter]:
        return None
    if letter:
        return letter
    return by_text[0] if len(by_text) == 1 else None


def _begins_line(text: str, position: int) -> bool:
    return not text[:position].rpartition("\n")[2].strip()
