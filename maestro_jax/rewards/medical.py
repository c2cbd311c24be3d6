"""SLAKE: closed and open questions about medical images, by normalised match.

Source: lmms-eval lmms_eval/tasks/slake/utils.py (`normalize_answer`), exact match after case, punctuation and the
spellings of X-ray and of yes and no. The paper's own reward (jinyangwu/Maestro,
verl_tool/workers/reward_manager/reward_score/slake.py) takes either text inside the other, so that "e" is right for
"Left lung" and "I do not know" for "No"; that is not followed.
"""

import re

from maestro_jax.rewards.choices import multiple_choice
from maestro_jax.rewards.counts import counted, parse_count
from maestro_jax.rewards.numbers import exact_text
from maestro_jax.rewards.reading import fold_text, parse_number, parse_yes_no, stated
from maestro_jax.types import Task

_PUNCTUATION = re.compile(r"[^\w\s%+.]|(?<!\d)\.|\.(?!\d)|_")
_LIST = re.compile(r"\s*(?:[,;，、；/\n]|\band\b|&)\s*", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\w)")
_SPELLINGS = {"x ray": "xray", "x rays": "xray", "xrays": "xray", "yeah": "yes", "yep": "yes", "nope": "no"}


def medical(task: Task, answer: str) -> bool:
    """Whether `answer` is one of the gold answers; lists in any order, options by letter or text."""
    if task.choices:
        return multiple_choice(task, answer)
    return any(_equal(answer, gold) for gold in task.answers)


def _equal(answer: str, gold: str) -> bool:
    yes_or_no = parse_yes_no(gold)
    if yes_or_no and normalised(gold) == (yes_or_no,):
        return parse_yes_no(answer) == yes_or_no or normalised(answer) == (yes_or_no,)
    if parse_count(gold) is not None or parse_number(gold):
        return counted(answer, gold) or exact_text(answer, gold)
    said, true = normalised(answer), normalised(gold)
    return sorted(said) == sorted(true) and any(true)


def normalised(text: str) -> tuple[str, ...]:
    """The items of an answer without case, punctuation and articles, in the order in which they stand."""
    return tuple(_item(fold_text(part)) for part in _LIST.split(stated(text)) if part)


def _item(text: str) -> str:
    plain = " ".join(_PUNCTUATION.sub(" ", text).split())
    plain = _ARTICLE.sub("", plain)
    return _SPELLINGS.get(plain, plain)
