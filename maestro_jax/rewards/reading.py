"""What an answer says: its statement, as a text, a number, a yes or a no.

In: untrusted text of at most a few thousand characters. Out: plain values; nothing is evaluated, and every reader
costs microseconds. Forgiven is plain formatting: case, quotes, edge punctuation, thousands separators, currency and
percent signs, unicode minus, full-width letters, `\\boxed{}`, a lead-in such as "the answer is".
"""

import dataclasses
import functools
import re
import unicodedata
from decimal import Decimal

MAX_EXPONENT = 99
MAX_MARKS = 30  # on one letter
_REMEMBERED = 256  # texts: a grader reads the same answer and options in several ways

_MINUS_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"))
_RANGE = re.compile(r"(?<=\d)(?: - ?|- | to )(?=\d)")
# "\u00bd" and its like, with what they are in ASCII; behind a digit they make a mixed number.
_VULGAR = {
    sign: unicodedata.normalize("NFKC", sign).replace("\u2044", "/")
    for sign in map(chr, (*range(0xBC, 0xBF), *range(0x2150, 0x215F)))
}
_VULGAR_SIGN = re.compile(f"( ?)([{''.join(_VULGAR)}])")
_FRACTION = re.compile(r"(-?) ?(?:([0-9]{1,9}) )?([0-9])/([0-9]{1,2}) ?(\\?%)?")
_FULL_WIDTH = str.maketrans({code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0x3000: " "})
_QUOTES = "\"'`*_“”‘’„«»"
_EDGES = _QUOTES + " \t\r\n.,;:!?…()[]{}"
_CURRENCY = "[$€£¥₹]"
_SPACES = " \u00a0\u2009\u202f"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<money>{_CURRENCY}?)\s*(?P<inner>[+-]?)"
    rf"(?P<digits>(?:[0-9]{{1,3}}(?:(?:,[0-9]{{3}})+|(?:[{_SPACES}][0-9]{{3}})+)|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    rf"(?:e(?P<exponent>[+-]?[0-9]{{1,3}}))?\s*(?P<unit>\\?%|°|{_CURRENCY})?",
    re.IGNORECASE,
)
# A lead-in starts a line or a sentence: what follows "I doubt that the answer is" is no statement.
_LEAD_IN = re.compile(
    r"(?:^|(?<=[.,;:!?\n])) ?[*_#>\"' ]{0,4}(?:(?:so|thus|hence|therefore|and|then|conclusion)\W{1,3}){0,3}"
    r"(?:(?:the|my) )?(?:(?:final|correct|right|best) )?answer[*_]{0,2} ?(?:is\b|=|:)[\s:*_]*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox) ?\{")
_YES_OR_NO = re.compile(r"(yes|no)(?![\w'-])\s*(?:[.,;:!\n-]\s*(.*))?", re.DOTALL)
_DOUBT = re.compile(r"\b(yes|no|not sure|unsure|unclear|maybe|perhaps|know|cannot|can't|or)\b")


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as written; `sign` is the currency, percent or degree sign that came with it."""

    value: Decimal
    sign: str


@functools.lru_cache(maxsize=_REMEMBERED)
def stated(text: str) -> str:
    """What an answer states: the content of its `\\boxed{}`, else what follows "the answer is", else all of it.

    Statements that differ are none: then the whole text stays, which is not what any single one says.
    """
    text = _VULGAR_SIGN.sub(_in_ascii, text.translate(_FULL_WIDTH))
    lines = (" ".join(line.split()) for line in text.splitlines())
    text = "\n".join(line for line in lines if line)
    boxes = _boxed(text)
    if boxes:
        return boxes[0].strip() if len({_folded(box) for box in boxes}) == 1 else text
    marks = list(_LEAD_IN.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    said = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=False)]
    said = [piece for piece in said if _folded(piece)]
    return said[-1] if said and len({_folded(piece) for piece in said}) == 1 else text


@functools.lru_cache(maxsize=_REMEMBERED)
def fold_text(text: str) -> str:
    """Case, whitespace, edge punctuation, quotes, a lead-in phrase and kinds of dashes folded away."""
    whole = " ".join(_composed(stated(text)).translate(_DASHES).casefold().split())
    whole = _RANGE.sub("-", whole)
    # A text of nothing but punctuation stays as it is: "?" is not "!".
    return _folded(whole) or whole


def parse_number(text: str) -> Number | None:
    """The number that `text` is, as a whole; None if it is anything else, or its exponent is beyond the cap.

    Separators count only where they group by three: "1,000" is 1000, "1,00" is no number.
    """
    plain = stated(text.translate(_MINUS_SIGNS)).lstrip(_QUOTES + " \t\r\n([{").rstrip(_EDGES)
    if has_vulgar_fraction(text):
        return parse_fraction(plain)
    match = _NUMBER.fullmatch(plain)
    if match is None or (match["sign"] and match["inner"]) or (match["money"] and match["unit"]):
        return None
    exponent = int(match["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    digits = re.sub(rf"[,{_SPACES}]", "", match["digits"])
    value = Decimal(f"{match['sign'] or match['inner']}{digits}e{exponent}")
    return Number(value, (match["money"] or match["unit"] or "").lstrip("\\"))


def parse_yes_no(text: str) -> str | None:
    """A yes or a no, alone or with a clause behind it ("No, the liver is normal"); None if in doubt, or both."""
    match = _YES_OR_NO.fullmatch(fold_text(text))
    if match is None or (match[2] and _DOUBT.search(match[2])):
        return None
    return match[1]


def _in_ascii(sign: re.Match[str]) -> str:
    """A vulgar fraction as "1/2", with a space before it where it may follow a whole number."""
    return f" {_VULGAR[sign[2]]}"


def has_vulgar_fraction(text: str) -> bool:
    """Whether "½" or its like stands in `text`; after `stated` that is "1/2", which may also be a date or a score."""
    return _VULGAR_SIGN.search(text) is not None


def parse_fraction(plain: str) -> Number | None:
    """The value of "1/2" or "1 1/2"."""
    match = _FRACTION.fullmatch(plain)
    if match is None or not int(match[4]):
        return None
    value = int(match[2] or 0) + Decimal(match[3]) / Decimal(match[4])
    return Number(-value if match[1] else value, (match[5] or "").lstrip("\\"))


def _composed(text: str) -> str:
    """NFC; a text in which more marks stand on a letter than Unicode's stream-safe form has stays as it is.

    Sorting a pile of marks takes the square of its height (UAX #15, section 13, limits it to 30).
    """
    if text.isascii():
        return text
    height = 0
    for character in text:
        height = height + 1 if unicodedata.combining(character) else 0
        if height > MAX_MARKS:
            return text
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    return text.casefold().strip(_EDGES)


def _boxed(text: str) -> list[str]:
    """The contents of every `\\boxed{}` that is closed, outermost ones only."""
    found, end = [], 0
    for match in _BOXED.finditer(text):
        if match.start() < end:
            continue
        depth, at = 1, match.end()
        while depth and at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth:
            break
        found.append(text[match.end() : at - 1])
        end = at
    return found
