"""Multiple choice: the letter of an option, its text, or both; never two options.

The benchmarks' scripts look for one option's letter, then for one option's text (VLMEvalKit
vlmeval/utils/matching_util.py `can_infer`, for HRBench, MicroVQA, MSEarthMCQ; lmms-eval
lmms_eval/tasks/{vstar_bench,erqa,hrbench}). They search the whole answer, so that "I do not know" can hold an option;
here the answer has to be the letter or the text, with what is plain formatting around it, or a letter with an
explanation that names no other option.
"""

import re
import string
from collections.abc import Callable, Sequence

from maestro_jax.rewards.numbers import exact_text
from maestro_jax.rewards.reading import fold_text, stated
from maestro_jax.types import Task

UNKNOWN_CHOICES = 10  # letters that may stand in an answer where nobody says how many options there were

Same = Callable[[str, str], bool]

_WORD = r"(?:(?:the |my )?(?:(?:correct|right|best) )?(?:option|choice|letter|answer)(?: is)? ?:? ?)?"
_CHOSEN = re.compile(r"(?:i|we) (?:choose|chose|pick|select|would (?:choose|pick|select)) ", re.IGNORECASE)
_LETTER = re.compile(rf"{_WORD}[(\[{{<]?([a-z])[)\]}}>]?[.:)]?", re.IGNORECASE)
_LETTER_FIRST = re.compile(
    rf"(?i:{_WORD})(?:[(\[{{]([A-Za-z])[)\]}}][.:,]?\s*[-–—]?"
    r"|([A-Z])(?:[.):,;\n]| [-–—]| (?=because\b|since\b|as\b)))\s*(.+)",
    re.DOTALL,
)
_LETTER_LAST = re.compile(r"(.+?)[\s,]*[(\[]([A-Z])[)\]]", re.DOTALL)
_MENTIONED = re.compile(
    r"(?<![\w'])([B-Z])(?![\w'])|\((A)\)|(?:\b(?:or|and|not|option|choice|than|nor)\s|[,/&] ?)(A)\b"
)
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathbb|rm|bf)\s?\{([^{}]*)\}")
_EDGES = " \t\r\n*_`$\"'“”‘’"


def multiple_choice(task: Task, answer: str) -> bool:
    """Whether `answer` names the gold option of `task`."""
    return chooses(task, answer, exact_text)


def chooses(task: Task, answer: str, same: Same) -> bool:
    """`multiple_choice` with another equality of texts.

    The gold answer is a letter, the option's text, or both (then `task.choices` may be missing, as in verl files).
    """
    letter, texts = gold_option(task, same)
    said = chosen(answer, task.choices, same)
    if said is not None:
        return said == letter
    return not task.choices and any(same(answer, text) for text in texts)


def gold_option(task: Task, same: Same) -> tuple[str | None, tuple[str, ...]]:
    """The letter of the right option, if it is known, and its texts."""
    letters = string.ascii_uppercase[: len(task.choices) or UNKNOWN_CHOICES]
    for answer in task.answers:
        bare = answer.strip(" ()[].:")
        if len(bare) == 1 and bare.upper() in letters and (bare.isupper() or not task.choices):
            return bare.upper(), tuple(other for other in task.answers if other != answer)
    for letter, choice in zip(letters, task.choices, strict=False):
        if any(same(answer, choice) for answer in task.answers):
            return letter, task.answers
    return None, task.answers


def chosen(answer: str, choices: Sequence[str], same: Same = exact_text) -> str | None:
    """The letter of the one option that `answer` names; None if it names none, several, or contradicts itself."""
    letters = string.ascii_uppercase[: len(choices) or UNKNOWN_CHOICES]
    form = undressed(answer)
    if match := _LETTER.fullmatch(form):
        return match[1].upper() if match[1].upper() in letters else _of_text(form, choices, same)
    if letter := _of_text(form, choices, same):
        return letter
    if match := _LETTER_LAST.fullmatch(form):
        return match[2] if _of_text(match[1], choices, same) == match[2] else None
    match = _LETTER_FIRST.fullmatch(form)
    if match is None:
        return None
    letter, rest = (match[1] or match[2]).upper(), match[3]
    if letter not in letters or _of_text(rest, choices, same) not in (None, letter):
        return None
    if _of_text(rest, choices, same) is None and _others(rest, letters, letter):
        return None
    return letter


def undressed(answer: str) -> str:
    """The statement of an answer without a markup around it."""
    form = _DRESS.sub(r"\1", stated(answer)).strip(_EDGES)
    form = form.removeprefix("\\(").removesuffix("\\)").strip(_EDGES)
    return _CHOSEN.sub("", form, count=1).strip(_EDGES)


def _of_text(text: str, choices: Sequence[str], same: Same) -> str | None:
    """The letter of the one option whose text it is."""
    equal = [letter for letter, choice in zip(string.ascii_uppercase, choices, strict=False) if same(text, choice)]
    if len(equal) > 1:  # such as "20" and "20 %", which are the same number
        equal = [letter for letter in equal if fold_text(text) == fold_text(choices[ord(letter) - ord("A")])]
    return equal[0] if len(equal) == 1 else None


def _others(text: str, letters: str, letter: str) -> bool:
    """Whether an explanation names an option besides `letter`; a capital A may also be an article."""
    if match := _LETTER.fullmatch(text):
        return match[1].upper() in letters and match[1].upper() != letter
    named = {group for match in _MENTIONED.finditer(text) for group in match.groups() if group}
    return bool(named & set(letters) - {letter})
