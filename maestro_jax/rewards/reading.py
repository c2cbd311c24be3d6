"""What an answer says: its statement, as a text, a number, a yes or a no.

In: untrusted text of at most a few thousand characters. Out: plain values; nothing is evaluated, and every reader
costs microseconds. Forgiven is plain formatting: case, quotes, edge punctuation, thousands separators, currency and
percent signs, unicode minus, full-width letters, `\\boxed{}`, a lead-in such as "the answer is".
"""

import dataclasses
import re
import unicodedata
from decimal import Decimal

MAX_EXPONENT = 99

_MINUS_SIGNS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"))
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


def stated(text: str) -> str:
    """What an answer states: the content of its `\\boxed{}`, else what follows "the answer is", else all of it.

    Statements that differ are none: then the whole text stays, which is not what any single one says.
    """
    lines = (" ".join(line.split()) for line in text.translate(_FULL_WIDTH).splitlines())
    text = "\n".join(line for line in lines if line)
    boxes = _boxed(text)
    if boxes:
        return boxes[0].strip() if len({_folded(box) for box in boxes}) == 1 else text
    marks = list(_LEAD_IN.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    said = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=False)]
    said = [piece for piece in said if _folded(piece)]
    return said[-1] if said and len({_folded(piece) for piece in said}) == 1 else text


def fold_text(text: str) -> str:
    """Case, whitespace, edge punctuation, quotes and a lead-in phrase folded away."""
    whole = " ".join(unicodedata.normalize("NFC", stated(text)).casefold().split())
    # A text of nothing but punctuation stays as it is: "?" is not "!".
    return _folded(whole) or whole


def parse_number(text: str) -> Number | None:
    """The number that `text` is, as a whole; None if it is anything else, or its exponent is beyond the cap.

    Separators count only where they group by three: "1,000" is 1000, "1,00" is no number.
    """
    plain = stated(text.translate(_MINUS_SIGNS)).lstrip(_QUOTES + " \t\r\n([{").rstrip(_EDGES)
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
