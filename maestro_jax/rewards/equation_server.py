"""The process that compares expressions with math-verify; `equations.py` starts it (no jax, no trainer in it).

    python -m maestro_jax.rewards.equation_server

It says "ready", then reads lines of JSON, [answer, gold, ...], and says "equal" or "different" to each. Every one is
made in a fork that the kernel ends when its computing time is used up, whatever it is in the middle of; the fork
has what was imported and warmed up before, so that the next one starts as fast as the first.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence

from math_verify import parse, verify

CPU_SECONDS = 0.5
MEMORY_BYTES = 1024 * 1024 * 1024
DECIMALS = 2  # see maths.py

# A parser's tables grow with what it has seen; cold, one expression takes up to 0.3 s.
WARM_UP = (
    (r"\frac{\sqrt{2}}{2}", r"\sqrt{2}/2"),
    (r"-\frac{24}{25}\pi+3", r"3-0.96\pi"),
    (r"(3,-4)", r"(3, -4)"),
    (r"\frac{3^{1008}-1}{3^{1009}}", r"\frac{a^2-1}{b}"),
    (r"2(\sqrt{2}-1)", r"2\sqrt{2}-2"),
    (r"\pi-\tan^{-1}\left(\frac{1}{d}\right)", r"\arctan(x)+\sin(x)"),
    (r"\{1,2\}\cup[0,1)", r"x^2+2x+1=0"),
    (r"|x|\cdot 2!", r"y \le 3"),
    (r"\log_2 8 + \ln e", r"\sqrt[3]{8}"),
    (r"1:2", r"10^5"),
)


def equal(answer: str, gold: str) -> bool:
    """Equal for math-verify, or as real numbers that are rounded to two decimals (see maths.py)."""
    said, true = read(answer), read(gold)
    if not said or not true:
        return False
    if verify(true, said, timeout_seconds=None):
        return True
    said_value, true_value = real(said), real(true)
    if said_value is None or true_value is None or round(true_value, DECIMALS) == 0:
        return False
    return round(said_value, DECIMALS) == round(true_value, DECIMALS)


def read(expression: str) -> list:
    return parse(f"${expression}$", parsing_timeout=None)


def real(parsed: Sequence) -> float | None:
    """The value of what was read, if it is a real number."""
    first = parsed[0]
    if not getattr(first, "is_number", False) or not first.is_real:
        return None
    return float(first.evalf())


def main() -> None:
    logging.disable()
    for answer, gold in WARM_UP:
        equal(answer, gold)
    say("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads what a library has to say from here on
    for line in sys.stdin:
        answer, *golds = json.loads(line)
        say("equal" if in_fork(answer, golds) else "different")


def in_fork(answer: str, golds: Sequence[str]) -> bool:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whoever has loaded libtpu ignores it, and what he starts too
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # the kernel ends it; no handler has to run
        code = 0 if any(equal(answer, gold) for gold in golds) else 1
    finally:
        os._exit(code)


def say(word: str) -> None:
    os.write(1, word.encode() + b"\n")


if __name__ == "__main__":
    main()
