"""OCRBench: the gold text has to stand in the answer, as the benchmark's authors define it.

Source: Yuliang-Liu/MultimodalOCR OCRBench/example.py. Case does not count, a line break is a space; in formulas
("Handwritten Mathematical Expression Recognition", data set HME100k) case counts and spaces do not.
"""

from maestro_jax.types import Task

FORMULA = "Handwritten Mathematical Expression Recognition"


def ocrbench(task: Task, answer: str) -> bool:
    """Whether the answer contains one of the gold texts."""
    form = formula_form if task.kind == FORMULA else text_form
    said = form(answer)
    return any(form(gold) in said for gold in task.answers if gold.strip())


def text_form(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def formula_form(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
