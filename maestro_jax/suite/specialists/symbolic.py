"""Sym-Solver: a blind symbolic solver. It never looks at pixels, only at words and read-out labels.

In come the question and the `Text in the image:` block (there only if the skill ran OCR). Out goes
a number: angle sums, perimeters, areas, Pythagoras and written-out arithmetic, or "I cannot tell.".
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence

from maestro_jax.registry.description.interface import Message
from maestro_jax.suite.specialists.prompting import UNKNOWN, last_user

_CORNERS = {"triangle": 3, "quadrilateral": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6}
_QUANTITY = re.compile(r"^(?:[a-z]\s*=\s*)?(\d+(?:\.\d+)?)\s*(?:°|º|o|mm|cm|km|m)?$", re.IGNORECASE)
# Possessive and from the start of a number on: a long one without an operator is not tried from every digit.
_EXPRESSION = re.compile(r"(?<!\d)\d++(?:\.\d++)?+(?:\s*+[-+*/]\s*+\d++(?:\.\d++)?+)+")
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class SymSolver:
    """Solves what the question's words and the labels determine."""

    def answer(self, messages: Sequence[Message]) -> str:
        prompt, _ = last_user(messages)
        texts = [item.text.strip() for item in prompt.text or ()]
        value = _solve(prompt.asked.lower(), texts)
        return UNKNOWN if value is None else write_number(value)


def write_number(value: float) -> str:
    """An integer where it is one, else at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def quantities(texts: Sequence[str]) -> list[float]:
    """The labels that are one number, with or without a unit or a name ("a = 5", "12 cm", "40°")."""
    matches = (_QUANTITY.match(text) for text in texts)
    return [float(match[1]) for match in matches if match]


def evaluate(expression: str) -> float | None:
    """The value of +, -, *, / over plain numbers; None when it has none."""
    try:
        return _evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ArithmeticError, ValueError, TypeError, KeyError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    return float(ast.literal_eval(node))


def _solve(question: str, texts: Sequence[str]) -> float | None:
    numbers = quantities(texts)
    if "angle" in question.replace("triangle", "").replace("rectangle", ""):
        return _missing_angle(question, numbers)
    if "hypotenuse" in question:
        return math.hypot(*numbers) if len(numbers) == 2 else None
    if re.search(r"\bleg\b", question):
        return math.sqrt(max(numbers) ** 2 - min(numbers) ** 2) if len(numbers) == 2 else None
    if "perimeter" in question or "way round" in question:
        return 2 * sum(numbers) if len(numbers) == 2 else sum(numbers) if len(numbers) > 2 else None
    if "area" in question:
        half = 0.5 if "triangle" in question else 1.0
        return half * numbers[0] * numbers[1] if len(numbers) == 2 else None
    return _arithmetic([question, *texts])


def _missing_angle(question: str, numbers: Sequence[float]) -> float | None:
    """Interior angles of n corners add up to (n - 2) * 180; one is missing."""
    # a degree sign is often read as a zero: "117°" comes as "1170"
    known = [number // 10 if number >= 180 and number % 10 == 0 else number for number in numbers]
    corners = next((count for name, count in _CORNERS.items() if name in question), len(known) + 1)
    missing = 180 * (corners - 2) - sum(known)
    return missing if len(known) == corners - 1 and 0 < missing < 360 else None


def _arithmetic(texts: Sequence[str]) -> float | None:
    """The first expression written out in a text."""
    plain = (text.replace("×", "*").replace("÷", "/").replace("−", "-").replace("–", "-") for text in texts)
    found = (_EXPRESSION.search(text) for text in plain)
    return next((value for match in found if match and (value := evaluate(match[0])) is not None), None)
