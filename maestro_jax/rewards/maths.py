"""Numbers and LaTeX expressions (MathVision, Geometry3K): what plain reading decides, and what is left for algebra.

In: an answer and its gold answers. Out: a verdict, or an `Equation` that `equations.py` decides in a process of its
own, since a hostile expression can take any time and memory.

Sources: MathVision's evaluation (mathllm/MATH-V evaluation/{evaluate,utils}.py: `is_equal`, `find_math_answer`) takes
texts that are equal after normalisation, and values that are equal when both are rounded to two decimals; the paper
grades Geometry3K with the same rounding (jinyangwu/Maestro verl_tool/workers/reward_manager/reward_score/math.py).
"""

import dataclasses
from fractions import Fraction

from maestro_jax.rewards.choices import chooses, chosen, gold_option
from maestro_jax.rewards.expressions import Expression, expression, value
from maestro_jax.rewards.numbers import exact_text
from maestro_jax.types import Task

DECIMALS = 2


@dataclasses.dataclass(frozen=True)
class Equation:
    """Is the expression `answer` equal to one of the expressions `golds`? LaTeX without wrapping."""

    answer: str
    golds: tuple[str, ...]


def maths(task: Task, answer: str) -> bool | Equation:
    """Whether `answer` is the gold value, or names the gold option.

    An option may also be given by its value ("\\frac12" for the option "0.5").
    """
    if not task.choices:
        return equals(answer, task.answers)
    if chooses(task, answer, plainly_equal):
        return True
    letter, _ = gold_option(task, plainly_equal)
    if letter is None or chosen(answer, task, plainly_equal):
        return False
    return equals(answer, (task.choices[ord(letter) - ord("A")],))


def equals(answer: str, golds: tuple[str, ...]) -> bool | Equation:
    """The verdict where plain reading has one: equal as texts or as numbers, or no expression at all."""
    if any(plainly_equal(answer, gold) for gold in golds):
        return True
    said = expression(answer)
    if said is None:
        return False
    left = [true.form for gold in golds if (true := expression(gold)) and _may_be_equal(said, true)]
    return Equation(said.form, tuple(left)) if left else False


def plainly_equal(answer: str, gold: str) -> bool:
    """Equal as texts or as expressions letter by letter, or as numbers when both are rounded to two decimals."""
    said, true = expression(answer), expression(gold)
    if said is None or true is None:
        return exact_text(answer, gold)
    if said.unit and true.unit and said.unit != true.unit:
        return False
    if said.form.replace(" ", "") == true.form.replace(" ", ""):
        return True
    said_value, true_value = value(said.form), value(true.form)
    return said_value is not None and true_value is not None and same_value(said_value, true_value)


def same_value(said: Fraction, true: Fraction) -> bool:
    """Equal when both are rounded to two decimals; of a gold value something has to be left then."""
    return said == true or (round(true, DECIMALS) != 0 and round(said, DECIMALS) == round(true, DECIMALS))


def _may_be_equal(said: Expression, true: Expression) -> bool:
    """Whether algebra can find two expressions equal that plain reading does not."""
    numeric = value(said.form) is not None and value(true.form) is not None
    units = bool(said.unit and true.unit) and said.unit != true.unit
    # One value is no list, and no equation: "6 = 5", "5, 6".
    shapes = any((sign in said.form) != (sign in true.form) for sign in "=,")
    return not (numeric or units or shapes)
