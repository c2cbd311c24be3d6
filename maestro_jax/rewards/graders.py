"""Is an answer right? One grader for each task source.

In: a task with its gold answers, and the policy's answer. Out: True or False. Plain
formatting is forgiven (case, quotes, edge punctuation, thousands separators, currency and percent signs,
unicode minus, a lead-in such as "the answer is"); content is not: nothing matches as a substring. Nothing
is evaluated, and length and exponent are capped, so a hostile answer costs microseconds.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal

from maestro_jax.errors import ConfigError
from maestro_jax.types import Task

MAX_ANSWER_CHARS = 4096
MAX_EXPONENT = 99
RELAXED_TOLERANCE = Decimal("0.05")  # ChartQA's relaxed accuracy: 5 % of the gold number
EXACT_TOLERANCE = Decimal("1e-6")

_MINUS_SIGNS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"))
_QUOTES = "\"'`*_“”‘’„«»"
_EDGES = _QUOTES + " \t\r\n.,;:!?…()[]{}"
_LEAD_IN = re.compile(r"(?:so\W+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\b|=|:)[\s:]*", re.IGNORECASE)
_CURRENCY = "[$€£¥₹]"
_SPACES = " \u00a0\u2009\u202f"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<money>{_CURRENCY}?)\s*(?P<inner>[+-]?)"
    rf"(?P<digits>(?:[0-9]{{1,3}}(?:(?:,[0-9]{{3}})+|(?:[{_SPACES}][0-9]{{3}})+)|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    rf"(?:e(?P<exponent>[+-]?[0-9]{{1,3}}))?\s*(?P<unit>%|°|{_CURRENCY})?",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as written; `sign` is the currency, percent or degree sign that came with it."""

    value: Decimal
    sign: str


def grade(task: Task, answer: str) -> bool:
    """Whether `answer` equals one of the task's gold answers by the rules of its source.

    Raises:
      ConfigError: no grader is known for the source.
    """
    matches = grader_for(task.source)
    if len(answer) > MAX_ANSWER_CHARS or not answer.strip():
        return False
    return any(matches(answer, gold) for gold in task.answers)


def grader_for(source: str) -> Callable[[str, str], bool]:
    """The grader of a source (names differ by case only); call it at start-up to find a wrong name early."""
    try:
        return GRADERS[source.casefold()]
    except KeyError:
        raise ConfigError(f'no grader for source "{source}"; known: {", ".join(GRADERS)}; add one to GRADERS') from None


# ---- graders -----------------------------------------------------------------------------------------------


def exact_text(answer: str, gold: str) -> bool:
    """Equal as numbers where both are numbers, else as folded texts."""
    said, true = parse_number(answer), parse_number(gold)
    if said and true:
        return said.value == true.value
    return fold_text(answer) == fold_text(gold)


def exact_integer(answer: str, gold: str) -> bool:
    """A count: a bare number with no sign of money, percent or angle, of exactly the gold value."""
    said, true = parse_number(answer), parse_number(gold)
    return said is not None and true is not None and not said.sign and said.value == true.value


def relaxed_accuracy(answer: str, gold: str) -> bool:
    """ChartQA's metric (Masry et al. 2022, section 5.1): numbers within 5 % of the gold number, texts exactly.

    The tolerance holds for every number, years too, as in the official script. "88 %" is 88 and also 0.88,
    as that script reads it, when only one of the two carries the sign. A gold 0 has no 5 %: exactly 0.
    """
    said, true = parse_number(answer), parse_number(gold)
    if said is None or true is None:
        return fold_text(answer) == fold_text(gold)
    if _within(said.value, true.value, RELAXED_TOLERANCE * abs(true.value)):
        return True
    if (said.sign == "%") == (true.sign == "%"):
        return False
    ratio = {True: said.value / 100, False: said.value}[said.sign == "%"]
    target = {True: true.value / 100, False: true.value}[true.sign == "%"]
    return _within(ratio, target, RELAXED_TOLERANCE * abs(target))


def exact_number(answer: str, gold: str) -> bool:
    """A length, an area or an angle, to 1e-6 (relative above 1); a text where the gold is none."""
    said, true = parse_number(answer), parse_number(gold)
    if said is None or true is None:
        return fold_text(answer) == fold_text(gold)
    return _within(said.value, true.value, EXACT_TOLERANCE * max(Decimal(1), abs(true.value)))


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "visual_qa": exact_text,
    "reading": exact_text,
    "counting": exact_integer,
    "charts": relaxed_accuracy,
    "geometry": exact_number,
    "chartqa": relaxed_accuracy,
}


def _within(said: Decimal, true: Decimal, tolerance: Decimal) -> bool:
    return abs(said - true) <= tolerance


# ---- reading -----------------------------------------------------------------------------------------------


def fold_text(text: str) -> str:
    """Case, whitespace, edge punctuation, quotes and a lead-in phrase folded away."""
    whole = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    # A text of nothing but punctuation stays as it is: "?" is not "!".
    return _without_lead_in(whole).strip(_EDGES) or whole


def parse_number(text: str) -> Number | None:
    """The number that `text` is, as a whole; None if it is anything else, or its exponent is beyond the cap.

    Separators count only where they group by three: "1,000" is 1000, "1,00" is no number.
    """
    plain = _without_lead_in(text.translate(_MINUS_SIGNS)).lstrip(_QUOTES + " \t\r\n([{").rstrip(_EDGES)
    match = _NUMBER.fullmatch(plain)
    if match is None or (match["sign"] and match["inner"]) or (match["money"] and match["unit"]):
        return None
    exponent = int(match["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    digits = re.sub(rf"[,{_SPACES}]", "", match["digits"])
    value = Decimal(f"{match['sign'] or match['inner']}{digits}e{exponent}")
    return Number(value, match["money"] or match["unit"] or "")


def _without_lead_in(text: str) -> str:
    text = text.strip()
    match = _LEAD_IN.match(text)
    return text[match.end() :] or text if match else text
