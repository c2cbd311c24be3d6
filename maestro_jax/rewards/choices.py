"""Multiple choice: the letter of an option, its text, or both; never two options.

The benchmarks' scripts look for one option's letter, then for one option's text (VLMEvalKit
vlmeval/utils/matching_util.py `can_infer`, for HRBench, MicroVQA, MSEarthMCQ; lmms-eval
lmms_eval/tasks/{vstar_bench,erqa,hrbench}). They search the whole answer, so that "I do not know" can hold an option;
here the answer has to be the letter or the text, with what is plain formatting around it, or a letter with an
explanation that names no other option.
"""

import re
import string
from collections.abc import Callable, Mapping

from maestro_jax.rewards.numbers import exact_text
from maestro_jax.rewards.reading import fold_text, parse_number, stated
from maestro_jax.rewards.wording import count_in, only_one_of, predicate, without_article
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
_LETTER_AND_TEXT = re.compile(r"([A-Z]),? (.+)", re.DOTALL)
_LISTED = re.compile(r", | or | and |/")
_LETTER_LAST = re.compile(r"(.+)[(\[]([A-Z])[)\]]", re.DOTALL)
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
    if (letter is None or not task.choices) and any(
        same(answer, text) for text in texts
    ):  # first: "E. coli" is no letter
        return True
    return letter is not None and chosen(answer, task, same) == letter


def gold_option(task: Task, same: Same) -> tuple[str | None, tuple[str, ...]]:
    """The letter of the right option, if it is known, and the gold answers that are texts."""
    letters, bare = _letters(task), [answer.strip(" ()[].:") for answer in task.answers]
    options = zip(letters, task.choices, strict=False)
    capital = [letter for letter in bare if len(letter) == 1 and letter in letters]
    by_text = [
        letter for letter, choice in options if not capital and any(same(answer, choice) for answer in task.answers)
    ]
    small = [letter.upper() for letter in bare if len(letter) == 1 and letter.upper() in letters]
    found = (capital or by_text or small)[:1]  # "b" may also be an option's text
    texts = tuple(answer for answer, letter in zip(task.answers, bare, strict=True) if [letter.upper()] != found)
    return (found[0] if found else None), texts


def chosen(answer: str, task: Task, same: Same) -> str | None:
    """The letter of the one option that `answer` names; None if it names none, several, or contradicts itself."""
    letters, options = _letters(task), _options(task, same)
    form = undressed(answer)
    if match := _LETTER.fullmatch(form):
        return match[1].upper() if match[1].upper() in letters else _of_text(form, options, same)
    if letter := _of_text(form, options, same):
        return letter
    if match := _LETTER_LAST.fullmatch(form):
        return match[2] if _of_text(match[1], options, same) == match[2] else None
    if (match := _LETTER_AND_TEXT.fullmatch(form)) and _of_text(match[2], options, same) == match[1]:
        return match[1]
    match = _LETTER_FIRST.fullmatch(form)
    if match is None:
        return _in_a_sentence(form, letters, options, same)
    letter, rest = (match[1] or match[2]).upper(), match[3]
    of_rest = _of_text(rest, options, same)
    if letter not in letters or of_rest not in (None, letter) or _several(rest, options, same):
        return None
    return None if of_rest is None and _others(rest, letters, letter) else letter


def undressed(answer: str) -> str:
    """The statement of an answer without a markup around it."""
    form = _DRESS.sub(r"\1", stated(answer)).strip(_EDGES)
    form = form.removeprefix("\\(").removesuffix("\\)").strip(_EDGES)
    return _CHOSEN.sub("", form, count=1).strip(_EDGES)


def _letters(task: Task) -> str:
    return string.ascii_uppercase[: len(task.choices) or UNKNOWN_CHOICES]


def _options(task: Task, same: Same) -> dict[str, str]:
    """Letter → text of the options; where nobody says what they were, of the right one."""
    if task.choices:
        return dict(zip(_letters(task), task.choices, strict=False))
    letter, texts = gold_option(task, same)
    return {letter: texts[0]} if letter and texts else {}


def _of_text(text: str, options: Mapping[str, str], same: Same) -> str | None:
    """The letter of the one option whose text it is, with an article before it or without."""
    equal = [letter for letter, option in options.items() if same(text, option)]
    if not equal and (bare := without_article(text)) != text:
        equal = [letter for letter, option in options.items() if same(bare, option)]
    if len(equal) > 1:  # such as "20" and "20 %", which are the same number
        equal = [letter for letter in equal if fold_text(text) == fold_text(options[letter])]
    return equal[0] if len(equal) == 1 else None


def _several(rest: str, options: Mapping[str, str], same: Same) -> bool:
    """Whether a short list of nothing but options stands behind a letter."""
    parts = _LISTED.split(rest, maxsplit=len(options))
    letters = {_of_text(part, options, same) for part in parts} if 1 < len(parts) <= len(options) else {None}
    return None not in letters and len(letters) > 1


def _in_a_sentence(form: str, letters: str, options: Mapping[str, str], same: Same) -> str | None:
    """The letter of the one option that a sentence names, and no letter but that."""
    text = fold_text(form)
    if (said := predicate(text)) and (letter := _of_text(said, options, same)):
        return letter
    if (count := count_in(text)) is not None:
        numbers = {letter: parse_number(option) for letter, option in options.items()}
        equal = [letter for letter, number in numbers.items() if number and not number.sign and number.value == count]
        return equal[0] if len(equal) == 1 else None
    if len(options) < 2:  # nobody says what the others are
        return None
    letter = only_one_of(text, {letter: without_article(fold_text(option)) for letter, option in options.items()})
    return None if letter is None or _others(form, letters, letter) else letter


def _others(text: str, letters: str, letter: str) -> bool:
    """Whether an explanation names an option besides `letter`; a capital A may also be an article."""
    if match := _LETTER.fullmatch(text):
        return match[1].upper() in letters and match[1].upper() != letter
    named = {group for match in _MENTIONED.finditer(text) for group in match.groups() if group}
    return bool(named & set(letters) - {letter})
