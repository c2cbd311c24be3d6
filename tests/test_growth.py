"""Foreign text costs at most n log n, whoever wrote it and whatever it says (docs/grading.md, "Hostile answers").

A policy, an expert or a row of data may hold any text; most of it is read with the interpreter's lock held, where a
slow reader stands in the way of all others. `growth.readers` lists the readers; the last tests compare that table with
the sources.

**Criterion.** A reader is timed on texts of `LENGTHS` characters, up to its cap or to the first that takes `ENOUGH`.
4n have to take less than `WORST` times as long as n: n log n takes 4.4 to 6 times as long, n² 16 times; the message
shows 2n as well. Times are of the processor, so that others who use it do not count. What takes less than `NOTHING`
counts as `NOTHING`: nothing is judged below `WORST` x `NOTHING` = 8 ms, which clocks and caches blur. A pair that looks
bad is measured again, the best of several; only what stays bad fails. One reading may take `PATIENCE` at most, then it
is broken off: what grows exponentially would never come back.
"""

import ast
import ctypes
import functools
import gc
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import maestro_jax
from maestro_jax.registry.description import names
from maestro_jax.rewards.graders import GRADERS
from tests.growth import GOLDS, Reader, compared_by, readers

# Closely at first: some readers refuse what is longer, and would take ages for a third of that.
LENGTHS = (8, 16, 32, 64, 128, 256, *(4**k for k in range(5, 11)))
WORST = 8.0
NOTHING = 1e-3  # seconds, as all that follow
ENOUGH = WORST * NOTHING
PATIENCE = 1.0
TRIES = 5
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
EXAMPLES = 8

# (before, what is repeated, behind)
SHAPES = [
    *(
        ("", unit, "")
        for unit in (" ", "\n", " \n", "\t", "\u00a0", "1", "9", "1,", ",000", "1.", ".", "1 ", "-", "–", "a")
    ),
    *(
        ("", unit, "")
        for unit in ("½", "²", "–", "a", "(", ")", "()", "[", "]", "{", "}", "{}", "<", "<x>", "\\", "$", "'", '"')
    ),
    *(
        ("", unit, "")
        for unit in ("*", "_", "/", "=", "+", "%", "@", "e", "é", "漢", "𝟙", "1e", "a,", "a ", "A ", "\x00")
    ),
    *(
        ("", unit, "")
        for unit in ("\u0301", "\u0315\u0300", "\ud800", "\u200b", "ß", "İ", "ǰ", "``` ", "?,", "B", "\x00")
    ),
    ("3.", "1", " approx"),
    ("3", "14", ".5 x"),
    ("a", "\u0300\u0316", "x"),
    ("a", " ", "b"),
    ("5", " ", "dogs"),
    ("- ", " ", "5"),
    ("<", " ", ">"),
    ("</", "\n", "think>"),
    ("```", " ", ""),
    ("```", "a", "\n"),
    ("\\text{", " ", ""),
    ("\\text{", "° ", "x"),
    ("\\frac{", "° ", "x"),
    ("{", "° ", "cm}x"),
    ("1", "° ", "x"),
    ("\\frac{1", "1", "}"),
    ("\\boxed{", "{", ""),
    ("x = ", "y = ", "5"),
    ("(", "1,", ")"),
    ("B", " ", "because"),
    ("The answer is ", "5 ", "."),
    ("1", ",000", "."),
    ("there are ", "very ", "3 dogs"),
]


class TooLong(BaseException):
    """A reading has used up its patience; no `except Exception` of a reader hides it."""


def seconds_of(read: Callable[[str], object], text: str) -> float:
    """Of the processor; infinite beyond the patience."""
    began = time.process_time()

    def look(*_: object) -> None:
        if time.process_time() - began > PATIENCE:
            raise TooLong

    # Looks by the clock on the wall: Linux counts a process's time in ticks once it has a timer on that.
    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE / 4)
    try:
        read(text)
    except TooLong:
        return float("inf")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return time.process_time() - began


def repeated(shape: tuple[str, str, str], length: int) -> str:
    before, unit, behind = shape
    return before + unit * max(1, (length - len(before) - len(behind)) // len(unit)) + behind


def problem(reader: Reader, shape: tuple[str, str, str]) -> str | None:
    """How a reader's time grows where it grows too fast; None where it does not."""

    def best(length: int, tries: int) -> float:
        text = repeated(shape, length)[: reader.cap]
        return min(seconds_of(reader.read, text) for _ in range(tries))

    def bad(short: float, long: float) -> bool:
        return long >= WORST * max(short, NOTHING)

    times: dict[int, float] = {}
    for length in (n for n in LENGTHS if n <= reader.cap):
        times[length] = best(length, 1)
        short, long = times.get(length // 4, NOTHING), times[length]
        if bad(short, long) and long < PATIENCE:
            short, long = best(length // 4, TRIES), best(length, TRIES)
        if bad(short, long):
            shown = {length // 4: short, length // 2: best(length // 2, 1), length: long}
            return f"{shape!r} takes, by its length: { ({n: f'{1000 * t:.1f} ms' for n, t in shown.items()}) }"
        if long >= ENOUGH:
            return None
    return None


@pytest.fixture(scope="module", autouse=True)
def _nothing_older() -> Iterator[None]:
    """What was there before is not gone through at every collection, and memory stays where it is.

    By default, glibc gives large blocks back to the kernel, which maps them anew, page by page: from one length to four
    times as much that cost a linear reader 8 times the time.
    """
    gc.freeze()
    libc = ctypes.CDLL(None)
    tunable = hasattr(libc, "mallopt")
    if tunable:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    yield
    if tunable:
        libc.mallopt(M_MMAP_MAX, 65536)  # glibc's defaults
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_else() -> Iterator[None]:
    """The collector's time is that of whatever else this process holds; damaged lines are no news here."""
    gc.collect()
    gc.disable()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


READERS = readers()


@pytest.mark.parametrize("name", READERS)
def test_hostile_shapes(name: str) -> None:
    reader = READERS[name]
    reader.read("")  # makes what is made once
    # Long texts are read by what knows little grammar: half of the shapes, and its own.
    shapes = [*SHAPES[:: 1 if reader.cap < 2**15 else 2], *(("", token, "") for token in reader.tokens)]
    assert next(filter(None, (problem(reader, shape) for shape in dict.fromkeys(shapes))), None) is None


@pytest.mark.parametrize("name", READERS)
def test_hypothesis_finds_no_hostile_shape(name: str) -> None:
    reader = READERS[name]
    reader.read("")
    piece = st.sampled_from([*reader.tokens, *(unit for _, unit, _ in SHAPES)])
    unit = st.lists(piece, min_size=1, max_size=3).map("".join)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(before=piece | st.just(""), unit=unit, behind=piece | st.just(""))
    def check(before: str, unit: str, behind: str) -> None:
        assert problem(reader, (before, unit, behind)) is None

    check()


# ---- the criterion -----------------------------------------------------------------------------------------


def sorted_characters(text: str) -> list[str]:
    return sorted(text * 4)


def every_pair(text: str) -> int:
    return sum(text.count(character) for character in text)


def digits_before_a_word(text: str) -> object:
    return re.fullmatch(r"(?:\d+|[a-z]|\s|\.)+", text)  # the tokens of expressions.py as they were


def fenced(text: str) -> list[str]:
    return re.findall(r"```[ \t]*([a-z]*)[ \t]*\n", text)  # the fence of programs.py as it was


SLOW = {
    every_pair: ("", "a", ""),
    digits_before_a_word: ("3.", "1", "!"),
    fenced: ("```", " ", "x"),
}


@pytest.mark.parametrize("read", SLOW)
def test_the_criterion_finds_what_grows_too_fast(read: Callable[[str], object]) -> None:
    assert problem(Reader(read, 2**15), SLOW[read])


@pytest.mark.parametrize("read", [sorted_characters, str.split, len])
def test_the_criterion_passes_n_log_n_while_others_use_the_processor(read: Callable[[str], object]) -> None:
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(2)]
    try:
        assert [problem(Reader(read, 2**20), shape) for shape in SHAPES[:12]] == [None] * 12
    finally:
        for other in others:
            other.kill()
            other.wait()


# ---- the table is complete ---------------------------------------------------------------------------------

PACKAGE = Path(maestro_jax.__file__).parent

# Functions with a regular expression, or all of a module or a folder, that read no text of policy, experts or data.
NO_FOREIGN_TEXT = {
    "aot/": "what the compiler of a plan says",
    "checkpoint/committed.py": "errors of the file system",
    "policy/hf_export.py": "the run's own settings",
    "command.py": "the user's command line",
    "config.py": "the user's settings",
    "evaluation/settings.py overridden": "the user's command line",
    "mapping.py": "the user's settings",
    "observe/trackers.py": "the user's settings, and names of metrics",
    "parallel/cluster.py": "the environment of the scheduler and errors of jax",
    "data/benchmarks/files.py parquet_files": "names of files in the user's folder",
    "policy/prompts.py Prompts.__init__": "the tokenizer's special tokens",
    "registry/experts/processes.py main": "the registry's own order to a process",
    "registry/description/hosts.py _is_pattern": "key_hosts of the user's registry; an endpoint's host goes to _fits",
    "rollout/protocol.py _foreign_pattern": "the tokenizer's special tokens",
    "registry/description/checks.py": "names and templates of the user's registry",
    "registry/description/prompt.py": "the prompt of the user's, and the names of the registry",
    "fleet/serving.py": "the user's serve commands",
    "rewards/reward.py _read_term": "the user's settings",
    "registry/description/stages.py placeholders": "templates of the user's registry",
}
# Functions of rewards/ that are given a text and read none.
NOT_READ = {
    "rewards/equation_server.py": "a process of its own, with a limit on its computing",
    "rewards/programs.py": "passes programs on to the sandbox",
    "rewards/graders.py": "names of sources, and the user's settings",
    "rewards/reward.py": "the user's settings",
}
EXPENSIVE = ("SequenceMatcher", "get_close_matches", "normalize", "parsedate_to_datetime", "raw_decode", "literal_eval")


class Uses(ast.NodeVisitor):
    """Names of the functions of a module that use regular expressions, or library functions that may be slow."""

    def __init__(self, patterns: set[str]):
        self.patterns, self.path, self.found = patterns, [], set[str]()

    def visit_ClassDef(self, node: Any) -> None:
        self.path.append(node.name)
        self.generic_visit(node)
        self.path.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.patterns and self.path:
            self.found.add(".".join(self.path))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        of_re = isinstance(node.value, ast.Name) and node.value.id == "re" and node.attr.islower()
        if (of_re and node.attr != "escape" or node.attr in EXPENSIVE) and self.path:
            self.found.add(".".join(self.path))
        self.generic_visit(node)


def compiles(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Attribute) and ast.unparse(part) == "re.compile" for part in ast.walk(node))


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def patterns_of(tree: ast.Module) -> set[str]:
    made = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and compiles(node)]
    return {name.id for node in made for name in ast.walk(node) if isinstance(name, ast.Name) and name.id.isupper()}


@functools.cache
def functions_that_match() -> set[str]:
    """ "module function" for all of the package."""
    trees, found = modules(), set()
    patterns = {name for tree in trees.values() for name in patterns_of(tree)}
    for module, tree in trees.items():
        here = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & patterns
        own = {name for name in here if name in patterns_of(tree) or imported(tree, name)}
        uses = Uses(own)
        uses.visit(tree)
        found |= {f"{module} {name}" for name in uses.found}
    return found


def imported(tree: ast.Module, name: str) -> bool:
    return any(isinstance(n, ast.ImportFrom) and name in [a.name for a in n.names] for n in ast.walk(tree))


@functools.cache
def functions_of_rewards_with_a_text() -> set[str]:
    found = set()
    for module, tree in modules().items():
        for node in tree.body if module.startswith("rewards/") else ():
            if isinstance(node, ast.FunctionDef) and any(
                argument.annotation is not None and ast.unparse(argument.annotation) == "str"
                for argument in node.args.args
            ):
                found.add(f"{module} {node.name}")
    return found


@pytest.fixture(scope="module")
def called() -> set[str]:
    """The functions of the package that the table reaches."""
    codes = set()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            codes.add(frame.f_code)

    names.normalise_name.cache_clear()
    logging.disable()
    sys.setprofile(note)
    try:
        for reader in READERS.values():
            for text in (*reader.samples, *reader.tokens, *(repeated(shape, 60) for shape in SHAPES[::4])):
                reader.read(text)
    finally:
        sys.setprofile(None)
        logging.disable(logging.NOTSET)
    inside = [code for code in codes if code.co_filename.startswith(str(PACKAGE))]
    return {f"{code.co_filename[len(str(PACKAGE)) + 1 :]} {code.co_qualname.split('.<')[0]}" for code in inside}


def missing(functions: Iterable[str], called: set[str], exempt: Iterable[str]) -> list[str]:
    exempt = tuple(exempt)
    return sorted(name for name in functions if name not in called and not name.startswith(exempt))


def test_every_function_with_a_regular_expression_is_reached(called: set[str]) -> None:
    functions = functions_that_match()
    assert len(functions) > 60
    assert not missing(functions, called, NO_FOREIGN_TEXT), "add a row to tests/growth.py, or a reason here"


def test_every_function_of_rewards_that_is_given_a_text_is_reached(called: set[str]) -> None:
    functions = functions_of_rewards_with_a_text()
    assert len(functions) > 40
    assert not missing(functions, called, NOT_READ), "add a row to tests/growth.py, or a reason here"


def test_every_source_is_graded_by_a_row() -> None:
    assert {compared_by(source) for source in GRADERS} == {compared_by(source) for source in GOLDS}


@pytest.mark.parametrize("exempt", [*NO_FOREIGN_TEXT, *NOT_READ])
def test_no_exemption_is_stale(exempt: str) -> None:
    assert any(name.startswith(exempt) for name in functions_that_match() | functions_of_rewards_with_a_text())
