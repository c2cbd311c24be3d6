"""Graders of one answer against one gold answer, where numbers count as numbers and texts as texts."""

from decimal import Decimal

from maestro_jax.rewards.reading import Number, fold_text, has_vulgar_fraction, parse_fraction, parse_number
from maestro_jax.rewards.wording import count_in, parse_words, predicate, without_article

RELAXED_TOLERANCE = Decimal("0.05")  # ChartQA's relaxed accuracy: 5 % of the gold number
EXACT_TOLERANCE = Decimal("1e-6")


def exact_text(answer: str, gold: str) -> bool:
    """Equal as numbers where both are numbers, else as folded texts."""
    said, true = parse_number(answer), parse_number(gold)
    if said and true:
        return said.value == true.value
    return fold_text(answer) == fold_text(gold)


def worded_text(answer: str, gold: str) -> bool:
    """`exact_text`, also with an article, in a sentence ("it is red"), and for a gold number in words."""
    if exact_text(answer, gold):
        return True
    true, said = parse_number(gold), worded_number(answer)
    if true is not None:
        return said is not None and said.value == true.value
    return fold_text(gold) in _readings(answer)


def exact_integer(answer: str, gold: str) -> bool:
    """A count of exactly the gold value: a number with no sign of money, percent or angle, in words, with its noun."""
    said, true = parse_number(answer), parse_number(gold)
    if said is not None and true is not None:
        return not said.sign and said.value == true.value
    counted = count_in(fold_text(answer)) if said is None else None
    return counted is not None and true is not None and counted == true.value


def exact_number(answer: str, gold: str) -> bool:
    """A length, an area or an angle, to 1e-6 (relative above 1), in digits or words; a text where the gold is none."""
    said, true = worded_number(answer), parse_number(gold)
    if said is None or true is None:
        return worded_text(answer, gold)
    return _within(said.value, true.value, EXACT_TOLERANCE * max(Decimal(1), abs(true.value)))


def worded_number(answer: str) -> Number | None:
    """The number that an answer is, in digits or words, or that its one sentence says of something."""
    if number := parse_number(answer):
        return number
    whole, *further = _readings(answer)
    for reading in further:
        number = parse_fraction(reading) if has_vulgar_fraction(answer) else parse_number(reading)
        if number is not None:
            return number
    values = [value for reading in (whole, *further) if (value := parse_words(reading)) is not None]
    return Number(Decimal(values[0]), "") if values else None


def _readings(answer: str) -> tuple[str, ...]:
    """What may be compared, folded: the answer, without an article, and what it says of its subject."""
    whole = fold_text(answer)
    if "\\" in whole:  # LaTeX is no sentence; two boxes without the edge of one would be one
        return (whole,)
    said = predicate(whole)
    return tuple(dict.fromkeys((whole, without_article(whole), *((said, without_article(said)) if said else ()))))


def relaxed_accuracy(answer: str, gold: str) -> bool:
    """ChartQA's metric (Masry et al. 2022, section 5.1): numbers within 5 % of the gold number, texts exactly.

    Source: `relaxed_correctness` of QwenLM/Qwen-VL eval_mm/evaluate_vqa.py, which lmms-eval took over
    (lmms_eval/tasks/chartqa/utils.py). The tolerance holds for every number, years too, as there. "88 %" is 88 and also
    0.88, as that script reads it, when only one of the two carries the sign. A gold 0 has no 5 %: exactly 0.
    """
    said, true = worded_number(answer), parse_number(gold)
    if said is None or true is None:
        return worded_text(answer, gold)
    if _within(said.value, true.value, RELAXED_TOLERANCE * abs(true.value)):
        return True
    if (said.sign == "%") == (true.sign == "%"):
        return False
    ratio = {True: said.value / 100, False: said.value}[said.sign == "%"]
    target = {True: true.value / 100, False: true.value}[true.sign == "%"]
    return _within(ratio, target, RELAXED_TOLERANCE * abs(target))


def _within(said: Decimal, true: Decimal, tolerance: Decimal) -> bool:
    return abs(said - true) <= tolerance
