"""The main program of a sandbox in which a program is tested; `tested.py` sends it there.

Beside it lie program.py and tests.py, and standard input holds a token. When all tests are over, the token is written
with the number of asserts that held. Who ends before that never gets there, with whatever exit code.
"""

import ast
import io
import os
import sys
import types
from typing import Any

TESTS = "tests.py"
HELD = "_asserts_that_held"  # a list in the namespace of the tests
LONGEST_TOKEN = 256


class _Counted(ast.NodeTransformer):
    """Every assert that holds adds to the list."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [node, *ast.parse(f"{HELD}.append(None)").body]


def main() -> None:
    run, read, write = exec, os.read, os.write  # the program may put others in their place
    tests, held = _tests(), list[None]()
    if tests is not None:
        sys.stdin = io.TextIOWrapper(io.BytesIO())  # a program that asks for input gets none
        sys.excepthook = _show
        import program

        setattr(program, HELD, held)
        program.__name__ = "__main__"  # some tests stand below that question
        run(tests, vars(program))
    write(1, read(0, LONGEST_TOKEN) + f" {len(held)}\n".encode())


def _tests() -> types.CodeType | None:
    """None if they hold no assert, or are no Python."""
    with open(TESTS, encoding="utf-8") as file:
        text = file.read()
    try:
        tree = ast.parse(text)
        if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            return None
        return compile(_Counted().visit(tree), TESTS, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A traceback without this file: whoever repairs the program has not written it."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


if __name__ == "__main__":
    main()
