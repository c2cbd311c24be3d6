"""Mathematics as it is written in answers: LaTeX or plain, with and without dress, read but never evaluated.

In: untrusted text. Out: bare LaTeX and a unit, or None where it is a text. Plain numbers and their ratios get a value.
What is dropped and rewritten follows MathVision's `find_math_answer` (mathllm/MATH-V evaluation/utils.py), and adds the
signs of plain text (√, π, ×, ²).
"""

import dataclasses
import re
from fractions import Fraction

from maestro_jax.rewards.reading import parse_number, stated

MAX_EXPRESSION_CHARS = 256
MAX_DEPTH = 16  # of brackets
MAX_DIGITS = 40  # of one number

# What an answer may be dressed in: mathematics means the same without.
_DROPPED = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits|quad|qquad|mathbf|rm|bf)(?![A-Za-z])"
    r"|\\[!,;:> ]|\\\(|\\\)|\\\[|\\\]|\\?\$"
)
_REWRITTEN = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\*\*"), "^"),
    (re.compile("[×⋅·∙]"), r"\\cdot "),
    (re.compile(r"\\(?:times|ast)(?![A-Za-z])"), r"\\cdot "),
    (re.compile("÷"), r"\\div "),
    (re.compile("π|(?<![A-Za-z\\\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile("∞"), r"\\infty "),
    (re.compile("²"), "^{2}"),
    (re.compile("³"), "^{3}"),
    (re.compile(r"√\s*\(([^()]*)\)|(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1\2}"),
    (re.compile(r"√\s*(\d+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*(\d|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\})\s+(?=\d)"), r"\\cdot "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|°"), ""),
)

# Units and how they are spelled in full; "m", "g", "l", "h" and "s" alone are units only behind a space.
_UNITS = {
    "mm": ("millimeter", "millimetre"),
    "cm": ("centimeter", "centimetre"),
    "dm": (),
    "m": ("meter", "metre"),
    "km": ("kilometer", "kilometre"),
    "in": ("inch", "inche"),
    "ft": ("foot", "feet"),
    "yd": ("yard",),
    "mi": ("mile",),
    "g": ("gram",),
    "kg": ("kilogram",),
    "ml": ("milliliter", "millilitre"),
    "l": ("liter", "litre"),
    "deg": ("degree",),
    "rad": ("radian",),
    "s": ("second", "sec"),
    "min": ("minute",),
    "h": ("hour", "hr"),
    "day": (),
    "week": (),
    "year": (),
    "point": (),
    "cent": (),
    "dollar": (),
    "euro": (),
    "km/h": ("kmh",),
    "m/s": (),
    "": ("unit",),
}
_UNIT_OF = {spelled: unit for unit, others in _UNITS.items() for spelled in (unit, *others) if spelled}
_LONG_UNIT = "|".join(f"{name}s?" for name in sorted(_UNIT_OF, key=len, reverse=True) if len(name) > 1)
_SHORT_UNIT = "".join(name for name in _UNIT_OF if len(name) == 1)
_WRAPPED_UNIT = re.compile(
    r"\\(?:text|mbox|mathrm)\s*\{\s*~?\s*([^{}]*?)\s*\}"
    rf"|\{{\s*~?\s*((?:(?:square|cubic) ?)?(?:{_LONG_UNIT}))\s*\}}\s*$"
)
_LAST_UNIT = re.compile(
    rf"(?:(?<=[\d)}}!.])|(?<=pi))(?:[~\s]*(?:square|cubic|sq\.?|cu\.?)? ?(?:{_LONG_UNIT})"
    rf"|[~\s]+(?:(?:square|cubic|sq\.?|cu\.?) )?[{_SHORT_UNIT}])\.?\s*(?:\^\s*\{{?[23]\}}?)?$"
)

_NAMED = re.compile(
    r"(?:m ?)?\\?(?:angle|triangle|overline|widehat|arc|area|perimeter|length)?"
    r"\s*\{?\s*(?:[A-Za-z]{1,3}|\\[a-z]+)\s*\}?"
    r"(?:_\{?\w\}?|\([a-z]\))?\s*=\s*(?=\S)"
)
_MIXED = re.compile(
    r"(-?)\s*(\d{1,6})\s*(?:\s(\d{1,6})\s*/\s*(\d{1,6})|\\frac\s*\{\s*(\d{1,6})\s*\}\s*\{\s*(\d{1,6})\s*\})"
)
_RATIO = re.compile(r"(-?)\s*\\frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}|([^/:\\{}]{1,40})[/:]([^/:\\{}]{1,40})")

# What an expression is made of; anything else is a text. Letters stand alone, as the names of unknowns.
_COMMANDS = (
    "frac sqrt pi cdot div pm mp infty sin cos tan cot sec csc arcsin arccos arctan log ln exp le leq ge geq lt gt ne "
    "neq cup cap in to alpha beta gamma delta theta lambda mu rho sigma phi varphi omega Delta operatorname angle "
    "triangle"
).split()
_TOKENS = re.compile(
    rf"(?:\\(?:{'|'.join(_COMMANDS)})(?![A-Za-z])|\\[%{{}}]|sin|cos|tan|log|ln|tg|\d|(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
    r"|[-+*/^_=<>≤≥()\[\]{}.,:;!|']|\s)++"  # possessive: what has been read is not tried in other ways
)
_SIGNS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-") | {"\u00a0": " ", "\u2009": " ", "\u202f": " "})
_LEFT = " \t\r\n,;:\"'“”*_`~"
_RIGHT = _LEFT + "."
_SPACES = re.compile(" {2,}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_TWO_NUMBERS = re.compile(r"\d\s+[\d.]")
_SCIENTIFIC = re.compile(r"\de[+-]?\d", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Expression:
    """LaTeX without wrapping, and the unit that stood behind it ("" without one)."""

    form: str
    unit: str


def expression(text: str) -> Expression | None:
    """The mathematics that an answer is, without dress, degree sign or "x ="; None if it is a text, or too large."""
    # The published test.jsonl of MathVision has a gold answer whose "\\f" was read as a form feed.
    form = stated(text.replace("\f", "\\f")).lstrip(_LEFT).rstrip(_RIGHT)
    if len(form) > 2 * MAX_EXPRESSION_CHARS:
        return None
    form = stated(_DROPPED.sub("", form.translate(_SIGNS))).lstrip(_LEFT).rstrip(_RIGHT)
    for pattern, replacement in _REWRITTEN:
        form = pattern.sub(replacement, form)
    form = _SPACES.sub(" ", form)  # some stand where signs were dropped; patterns may try all divisions of a run
    form = _WRAPPED_UNIT.sub(r" \1\2", form).lstrip(_LEFT).rstrip(_RIGHT)
    if match := _NAMED.match(form):
        form = form[match.end() :]
    unit = ""
    if match := _LAST_UNIT.search(form):
        form, unit = form[: match.start()].lstrip(_LEFT).rstrip(_RIGHT), _unit(match[0])
    if not re.search(r"[()\[\]]", form):  # else the comma may be that of a tuple
        form = _THOUSANDS.sub("", form)
    too_large = len(form) > MAX_EXPRESSION_CHARS or depth(form) > MAX_DEPTH or _LONG_NUMBER.search(form)
    if too_large or _TWO_NUMBERS.search(_MIXED.sub("", form)) or not _TOKENS.fullmatch(form):
        return None
    if _SCIENTIFIC.search(form):  # "3e1" is no product with Euler's number
        number = parse_number(form)
        return Expression(f"{number.value:f}", unit) if number else None
    return Expression(form, unit)


def value(form: str) -> Fraction | None:
    """The value of a number, a mixed number ("1 1/2"), or a ratio of two numbers."""
    if "!" in form:  # the factorial, not an exclamation
        return None
    if number := parse_number(form):
        return Fraction(number.value)
    if match := _MIXED.fullmatch(form):
        whole, above, below = (int(group) for group in match.groups()[1:] if group)
        return (whole + Fraction(above, below)) * (-1 if match[1] else 1) if below else None
    if match := _RATIO.fullmatch(form):
        numbers = parse_number(match[2] or match[4]), parse_number(match[3] or match[5])
        if numbers[0] and numbers[1] and numbers[1].value:
            return Fraction(numbers[0].value) / Fraction(numbers[1].value) * (-1 if match[1] else 1)
    return None


def depth(text: str) -> int:
    """How deep brackets of any kind are nested."""
    now = deepest = 0
    for character in text:
        now += (character in "([{") - (character in ")]}")
        deepest = max(deepest, now)
    return deepest


def _unit(written: str) -> str:
    """One spelling of a unit: "square inches" is "in2"."""
    name = re.sub(r"^(?:square|cubic|sq|cu)(?=[a-z])", "", re.sub(r"[^a-z/]", "", written))
    unit = _UNIT_OF[name] if name in _UNIT_OF else _UNIT_OF[name.removesuffix("s")]
    square, cubic = re.search(r"sq|\^\s*\{?2", written), re.search(r"cu|\^\s*\{?3", written)
    return unit and unit + ("2" if square else "3" if cubic else "")
