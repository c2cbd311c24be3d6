"""Graders of one answer against one gold answer, where numbers count as numbers and texts as texts."""

from decimal import Decimal

from maestro_jax.rewards.reading import fold_text, parse_number

RELAXED_TOLERANCE = Decimal("0.05")  # ChartQA's relaxed accuracy: 5 % of the gold number
EXACT_TOLERANCE = Decimal("1e-6")


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


def exact_number(answer: str, gold: str) -> bool:
    """A length, an area or an angle, to 1e-6 (relative above 1); a text where the gold is none."""
    said, true = parse_number(answer), parse_number(gold)
    if said is None or true is None:
        return fold_text(answer) == fold_text(gold)
    return _within(said.value, true.value, EXACT_TOLERANCE * max(Decimal(1), abs(true.value)))


def relaxed_accuracy(answer: str, gold: str) -> bool:
    """ChartQA's metric (Masry et al. 2022, section 5.1): numbers within 5 % of the gold number, texts exactly.

    Source: `relaxed_correctness` of QwenLM/Qwen-VL eval_mm/evaluate_vqa.py, which lmms-eval took over
    (lmms_eval/tasks/chartqa/utils.py). The tolerance holds for every number, years too, as there. "88 %" is 88 and also
    0.88, as that script reads it, when only one of the two carries the sign. A gold 0 has no 5 %: exactly 0.
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


def _within(said: Decimal, true: Decimal, tolerance: Decimal) -> bool:
    return abs(said - true) <= tolerance
