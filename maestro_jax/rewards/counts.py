"""Counts and the other short answers of VLMsAreBlind: exact, whatever words and braces stand around them."""

import re

from maestro_jax.rewards.reading import fold_text, parse_number, parse_yes_no, stated
from maestro_jax.rewards.wording import NUMBER_WORDS, count_in, parse_words, predicate

_HEDGES = {"yes", "no", "or", "not", *NUMBER_WORDS} - {"one"}  # "the one that is circled"
_BRACED = re.compile(r"\{([^{}]*)\}")
_DIGITS = r"[{(]?(\d{1,4})[)}]?"
_GRID = (
    re.compile(rf"rows?\s*[=:]?\s*{_DIGITS}\W*\s(?:and\s)?col(?:umn)?s?\s*[=:]?\s*{_DIGITS}"),
    re.compile(rf"{_DIGITS}\s*rows?\W*\s(?:and\s)?{_DIGITS}\s*col(?:umn)?s?"),
    re.compile(rf"[(\[]?\s*{_DIGITS}\s*(?:,|x|×|by|\\times)\s*{_DIGITS}\s*[)\]]?"),
    re.compile(r"\{(\d{1,4})\}\s*\{(\d{1,4})\}"),
)
_GRID_TURNED = (
    re.compile(rf"col(?:umn)?s?\s*[=:]?\s*{_DIGITS}\W*\s(?:and\s)?rows?\s*[=:]?\s*{_DIGITS}"),
    re.compile(rf"{_DIGITS}\s*col(?:umn)?s?\W*\s(?:and\s)?{_DIGITS}\s*rows?"),
)


def counted(answer: str, gold: str) -> bool:
    """TallyQA's metric, exact accuracy (Acharya et al. 2019, section 5): the gold number, in digits or words.

    VLMEvalKit vlmeval/dataset/utils/tallyqa.py reads words up to twenty, and takes the first number anywhere in the
    answer; here a count may stand with its noun ("there are three dogs"), and "4 or 5" says neither.
    """
    said, true = said_count(answer), parse_count(gold)
    return said is not None and said == true


def said_count(answer: str) -> int | None:
    """The count that an answer states: alone, with its noun, or in a sentence of one number."""
    count = parse_count(answer)
    if count is not None or parse_number(answer) is not None:
        return count
    whole = fold_text(answer)
    said = predicate(whole)
    count = count_in(whole)
    return count_in(said) if count is None and said else count


def blind(answer: str, gold: str) -> bool:
    """VLMsAreBlind (Rahmanzadehgervi et al. 2024): a count, "rows,columns", yes or no, or a letter, exactly.

    Which of them, the gold answer shows. The questions ask for braces around the answer; a sentence with exactly one
    pair of them says what they hold. Source: lmms-eval lmms_eval/tasks/vlmsareblind/utils.py `parse_response`, which
    takes the first number or letter of any answer; here an answer with two is wrong.
    """
    if grid := parse_grid(gold):
        return parse_grid(answer) == grid
    said_text = _braced(answer)
    if gold.strip().casefold() in ("yes", "no"):
        return parse_yes_no(said_text) == gold.strip().casefold()
    if parse_count(gold) is not None:
        return counted(said_text, gold)
    return fold_text(said_text) == fold_text(gold)


def parse_count(text: str) -> int | None:
    """A whole number that `text` is, with no sign of money, percent or angle."""
    number = parse_number(text)
    if number is None:
        return parse_words(fold_text(text))
    whole = number.value.to_integral_value()
    return int(whole) if not number.sign and whole == number.value else None


def parse_grid(text: str) -> tuple[int, int] | None:
    """(rows, columns), from "5,6", "{5}{6}", "rows={5} columns={6}", "5 rows and 6 columns", "5 x 6"."""
    form = " ".join(stated(text).casefold().split()).strip(" .$*`\"'")
    for pattern in _GRID:
        if match := pattern.fullmatch(form):
            return int(match[1]), int(match[2])
    for pattern in _GRID_TURNED:
        if match := pattern.fullmatch(form):
            return int(match[2]), int(match[1])
    return None


def _braced(answer: str) -> str:
    """What the one pair of braces holds, if nothing beside it is an answer too; else all of the answer."""
    inside = _BRACED.findall(answer)
    outside = re.findall(r"\w+", _BRACED.sub(" ", answer.casefold()))
    alone = not any(word in _HEDGES or word.isdigit() for word in outside)
    return inside[0] if len(inside) == 1 and alone else answer
