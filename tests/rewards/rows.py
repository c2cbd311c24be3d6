"""The grading tables in tests/rewards/tables: hand-checked (answer, truth, verdict) rows, a file for each family.

    = SOURCE (KIND) :: TRUTH || TRUTH      the task of what follows; KIND may be left out
    ? OPTION || OPTION                     its options, if it has any
    + ANSWER                               is right
    - ANSWER                               is wrong

⏎ is a line break, ␣ a space at an end, ␌ a form feed; lines with # are remarks. Programs have a
table of their own kind, code.txt.
"""

import dataclasses
import re
from pathlib import Path

from maestro_jax.types import Task

TABLES = Path(__file__).with_name("tables")
FAMILIES = ("suite", "relaxed", "choices", "integers", "maths", "medical", "ocrbench")
_TASK = re.compile(r"= (\S+)(?: \((.+?)\))? :: (.*)")


@dataclasses.dataclass(frozen=True)
class Row:
    task: Task
    answer: str
    right: bool
    where: str  # file and line


def read_rows(family: str) -> list[Row]:
    """The rows of a family's table."""
    rows: list[Row] = []
    path = TABLES / f"{family}.txt"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if match := _TASK.fullmatch(line):
            task = Task("", "", (), _listed(match[3]), match[1], kind=match[2] or "")
        elif line.startswith("? "):
            task = dataclasses.replace(task, choices=_listed(line[2:]))
        elif line.startswith(("+ ", "- ")):
            rows.append(Row(task, _text(line[2:]), line[0] == "+", f"{path.name}:{number}"))
        elif line and not line.startswith("#"):
            raise ValueError(f"{path}:{number} is none of the kinds of lines that {__file__} lists")
    return rows


def read_programs() -> list[Row]:
    """The rows of code.txt, which says itself how it is written."""
    rows: list[Row] = []
    path = TABLES / "code.txt"
    for number, block in enumerate(
        re.split(r"^(?====$|\+\+\+|---)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ):
        head, _, text = block.partition("\n")
        if head == "===":
            task = Task("", "", (), (text,), "HumanEval-V", kind="code")
        elif number:
            answer = f"```python\n{text}```" if head.endswith("fenced") else text
            rows.append(Row(task, answer, head.startswith("+"), f"{path.name}, block {number}"))
    return rows


def _listed(text: str) -> tuple[str, ...]:
    return tuple(_text(part) for part in text.split(" || "))


def _text(text: str) -> str:
    return text.replace("⏎", "\n").replace("␣", " ").replace("␌", "\f")
