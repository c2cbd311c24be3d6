"""Multiple choice: options and their letters, in question texts and out of them."""

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase

# "A. ", "B) ", "(C) " or "D: ", at the beginning of a line or behind a space.
_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):]\s+", re.MULTILINE)
_INLINE = re.compile(r"(?:(?<=\s)|^)\(?([A-Z])[.):]\s+")


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

    Options on lines of their own end with the line; options within a line end where the next one begins. The last run
    of letters counts: a caption before may have parts (A) and (B), too.
    """
    for marker in (_LINE, _INLINE):
        run = _last_run(list(marker.finditer(text)))
        if run:
            ends = [*(match.start() for match in run[1:]), len(text)]
            options = [text[match.end() : end].strip() for match, end in zip(run, ends, strict=True)]
            if marker is _LINE:
                options = [option.split("\n", 1)[0].strip() for option in options]
            return text[: run[0].start()].strip(), tuple(options)
    return text.strip(), ()


def _last_run(markers: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last of the runs A, B, ... that has at least two letters."""
    runs: list[list[re.Match[str]]] = []
    for match in markers:
        if match[1] == "A":
            runs.append([match])
        elif runs and match[1] == LETTERS[len(runs[-1]) % len(LETTERS)]:
            runs[-1].append(match)
    return next((run for run in reversed(runs) if len(run) > 1), [])


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
