"""Verdicts on programs: what passes tests, and what only looks as if it did."""

import asyncio

import pytest

from maestro_jax.sandbox.interface import Limits, Sandbox
from maestro_jax.sandbox.tested import Judged, Verdict, run_tests

LIMITS = Limits(cpu_seconds=1.0)
GOOD = "def f(x): return x + 1"
WRONG = "def f(x): return x"
TESTS = "assert f(1) == 2\nassert f(2) == 3"

# None of these has an f that adds 1.
DECEPTIONS = {
    "leaves with 0": "import sys; sys.exit(0)",
    "raises SystemExit": "raise SystemExit",
    "leaves at once": "import os; os._exit(0)",
    "leaves when it is called": "def f(x): raise SystemExit(0)",
    "leaves at once when it is called": "import os\ndef f(x): os._exit(0)",
    "leaves with 0 at exit": f"import atexit, os; atexit.register(os._exit, 0)\n{WRONG}",
    "leaves with 0 on an error": f"import os, sys; sys.excepthook = lambda *what: os._exit(0)\n{WRONG}",
    "writes a token at exit": f"import atexit; atexit.register(print, '0' * 32, 2)\n{WRONG}",
    "writes a token that it guesses": "import os; os.write(1, b'0' * 32 + b' 2\\n'); os._exit(0)",
    "writes the token with a number that nobody reads": "import os\n"
    "os.write(1, os.read(0, 99) + b' ' + b'9' * 5000 + b'\\n'); os._exit(0)",
    "writes what it is asked": "try: print(input(), 2)\nfinally: raise SystemExit",
    "writes its input": "import sys; print(sys.stdin.read(), 2); raise SystemExit",
    "writes the harness": "print(open('main.py').read(), 2); raise SystemExit",
    "lets nothing run": "import builtins; builtins.exec = lambda *what: None",
    "overwrites builtins": f"import builtins as b; b.AssertionError = b.int = b.len = lambda *x: 0\n{WRONG}",
    "swallows errors": f"import sys; sys.excepthook = print\n{WRONG}",
    "is no Python": "The function adds one to x.",
    "is empty": "",
    "has a NUL": "x = '\0'",
    "runs for ever": "while True: pass",
    "is wrong": WRONG,
    "is right once": "def f(x): return 2",
}

PASSING = {
    "plain": (GOOD, TESTS),
    "a future import": (f"from __future__ import annotations\n{GOOD}", TESTS),
    "a data class": (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n"
        "def f(x): return A(x).x + 1",
        TESTS,
    ),
    "a main block": (f"{GOOD}\nif __name__ == '__main__':\n    print(f(int(input())))", TESTS),
    "input in vain": (f"import sys\n{GOOD}\nprint(sys.stdin.read(), sys.stdin.buffer.read())", TESTS),
    "tests in a main block": (GOOD, "if __name__ == '__main__':\n    assert f(1) == 2"),
    "tests in a function": (GOOD, f"def test():\n    {TESTS.splitlines()[0]}\ntest()"),
    "tests in a loop": (GOOD, "for x in range(3):\n    assert f(x) == x + 1, x"),
    "output of its own": (f"{GOOD}\nimport os; os.write(1, b'no line'); print('a line')", TESTS),
    "functions overwritten": (f"import os, builtins\nos.read = os.write = builtins.exec = None\n{GOOD}", TESTS),
}

NO_TESTS = {
    "empty": "",
    "no assert": "f(1)\nprint(f(2))",
    "a comment": "# assert f(1) == 2",
    "never called": "def test():\n    assert f(1) == 0",
    "never reached": "if not f:\n    assert f(1) == 0",
    "no Python": "assert f(1) ==",
    "a NUL": "assert f(1) == '\0'",
}


def judged(sandbox: Sandbox, program: str, tests: str = TESTS) -> Judged:
    return asyncio.run(run_tests(sandbox, program, tests, LIMITS))


@pytest.mark.parametrize("name", PASSING)
def test_what_is_right_passes(sandbox: Sandbox, name: str) -> None:
    found = judged(sandbox, *PASSING[name])
    assert (found.verdict, found.why) == (Verdict.PASSED, "")


def test_nothing_else_passes(sandbox: Sandbox) -> None:
    async def all_of_them() -> list[Judged]:
        return await asyncio.gather(*(run_tests(sandbox, text, TESTS, LIMITS) for text in DECEPTIONS.values()))

    for name, found in zip(DECEPTIONS, asyncio.run(all_of_them()), strict=True):
        assert found.verdict is Verdict.FAILED and found.why, name


def test_without_an_assert_there_is_no_verdict(sandbox: Sandbox) -> None:
    async def all_of_them() -> list[Judged]:
        return await asyncio.gather(*(run_tests(sandbox, GOOD, tests, LIMITS) for tests in NO_TESTS.values()))

    for name, found in zip(NO_TESTS, asyncio.run(all_of_them()), strict=True):
        assert found.verdict is Verdict.UNTESTED, (name, found)


def test_who_leaves_early_is_told_so(sandbox: Sandbox) -> None:
    assert judged(sandbox, DECEPTIONS["leaves with 0"]).why == "it ended before its tests were over"


def test_an_error_shows_the_test_and_the_program_and_nothing_of_ours(sandbox: Sandbox) -> None:
    why = judged(sandbox, WRONG).why
    assert "assert f(1) == 2" in why and why.endswith("AssertionError") and "main.py" not in why
    why = judged(sandbox, "def f(x): return x / 0").why
    assert "program.py" in why and "return x / 0" in why and "main.py" not in why
    why = judged(sandbox, "def f(x) return x").why
    assert "SyntaxError" in why and "main.py" not in why
