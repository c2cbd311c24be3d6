"""Algebra in processes of its own: hostile expressions are wrong, cheap, and hurt nobody."""

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_jax.errors import ConfigError
from maestro_jax.rewards import equations
from maestro_jax.rewards.equations import Equations
from maestro_jax.rewards.graders import BUILT_IN, Answer
from maestro_jax.rewards.maths import Equation
from maestro_jax.types import Task

TRUE, FALSE = Equation(r"2\sqrt{2}", (r"\sqrt{8}",)), Equation(r"2\sqrt{2}", (r"\sqrt{3}", "1"))
HOSTILE = [  # each passes plain reading and reaches algebra
    "10**10**10",
    "(x+1)^{99999}",
    "1000000!",
    r"\sin(10^{10^{10}})",
    "|" * 100,
    r"\frac{1}{0}+1",
]
MORE_HOSTILE = [
    "10^{10^{10}}",
    "9^9^9^9",
    r"2^{2^{2^{2^{2^{2}}}}}",
    r"e^{e^{e^{e^{e}}}}",
    r"\pi^{\pi^{\pi^{\pi}}}",
    "x^{99999999}",
    "(a+b+c+d+e+f)^{40}",
    "(10^6)!",
    "3!!!!!!",
    r"\log(\log(\log(10^{10^{9}})))",
    r"\frac{1}{" * 15 + "2" + "}" * 15,
    r"\sqrt{" * 15 + "2" + "}" * 15,
    "((((((((((((1))))))))))))",
    "0.1" + "+1/3" * 60,
    "1/0+2",
]
NEVER_READ = [  # plain reading says no at once
    r"\frac{" * 800,
    r"\frac12" * 585,
    "(" * 4000,
    "{" * 200 + "1" + "}" * 200,
    "9" * 4000,
    "9" * 200,
    "x=" * 2000,
    "1+" * 2000,
    "\\boxed{" * 500,
    "a" * 4000,
    "a?" * 2000,
    "the answer is " * 280,
    "\u221a" * 4000,
    "$" * 4000,
    "\\" * 4000,
    "\\left" * 800,
    "__import__('os').system('id')",
    "1;2;3" * 800,
    "-" * 4000,
    "1 " * 2000,
    "1," * 2000,
    "\ud800",
    "\x00",
]


@pytest.fixture(scope="module")
def algebra() -> Iterator[Equations]:
    processes = Equations(1)
    yield processes
    processes.close()


def graded(answers: list[str]) -> list[bool]:
    task = Task("", "", (), ("5", r"2\sqrt{3}"), "MathVision")
    return BUILT_IN.outcomes([Answer(task, answer) for answer in answers])


def test_hostile_expressions_are_different_and_the_process_lives_on(
    algebra: Equations, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = [Equation(answer, (r"2\sqrt{3}",)) for answer in HOSTILE]
    assert not any(algebra.decide(hostile))
    assert algebra.decide([TRUE, FALSE]) == [True, False]
    assert not caplog.records  # none had to be replaced


@pytest.mark.slow
def test_more_hostile_expressions(algebra: Equations, caplog: pytest.LogCaptureFixture) -> None:
    assert not any(algebra.decide([Equation(answer, (r"2\sqrt{3}",)) for answer in MORE_HOSTILE]))
    assert not caplog.records


MEASURE = """
import resource, sys
from maestro_jax.rewards import equation_server
assert equation_server.in_fork("3", ["3"]) and not equation_server.in_fork("3", ["4"])
before = resource.getrusage(resource.RUSAGE_CHILDREN)
assert not equation_server.in_fork(sys.argv[1], [r"2\\sqrt{3}"])
after = resource.getrusage(resource.RUSAGE_CHILDREN)
print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


IGNORING = "import signal; signal.signal(signal.SIGPROF, signal.SIG_IGN)\n"  # as libtpu does, and all inherit it


@pytest.mark.parametrize("before", ["", IGNORING])
@pytest.mark.parametrize("answer", ["10**10**10", "1000000!"])
def test_a_hostile_expression_costs_less_than_a_second_of_computing(answer: str, before: str) -> None:
    """In a process of its own, as small as the server's: JAX alone takes more memory than a fork may."""
    ran = subprocess.run([sys.executable, "-c", before + MEASURE, answer], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert 0.01 < float(ran.stdout) < 1.0  # it was tried, and ended


def test_what_is_no_expression_is_read_and_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: Equations, equations: list[Equation]) -> list[bool]:
        assert not equations
        return []

    monkeypatch.setattr(Equations, "decide", asked)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert not any(graded(NEVER_READ))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 1.0


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\\frac", "\\sqrt", "{", "}", "^", "(", ")", "9", "x", "+", "-", "!", "=", ",", "|", " "])
    )
)
def test_any_mixture_of_mathematics_has_a_verdict(parts: list[str]) -> None:
    assert graded(["".join(parts)]) in ([True], [False])


def test_a_process_that_is_gone_or_hangs_is_replaced(algebra: Equations, monkeypatch: pytest.MonkeyPatch) -> None:
    assert algebra.decide([TRUE]) == [True]
    server = algebra._idle.queue[0]
    server._process.kill()
    assert algebra.decide([TRUE]) == [True]
    assert algebra._idle.queue[0] is not server


def test_signals_that_stop_a_run_leave_the_process_alone(algebra: Equations) -> None:
    """Slurm sends them to every process of a job, and what was under way would count as different."""
    assert algebra.decide([TRUE]) == [True]
    server = algebra._idle.queue[0]
    for number in (signal.SIGTERM, signal.SIGINT):
        server._process.send_signal(number)
    assert algebra.decide([TRUE]) == [True]
    assert algebra._idle.queue[0] is server


def test_no_process_starts_without_an_equation() -> None:
    processes = Equations(2)
    assert processes.decide([]) == []
    assert list(processes._idle.queue) == [None, None]


def test_processes_end_when_they_are_closed() -> None:
    processes = Equations(1)
    processes.decide([TRUE])
    server = processes._idle.queue[0]
    processes.close()
    assert server._process.poll() is not None
    assert list(processes._idle.queue) == [None]


def test_a_process_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equations.sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match=r"does not start .*; install math-verify"):
        Equations(1).decide([TRUE])


def test_the_process_knows_neither_jax_nor_the_trainer() -> None:
    script = (
        "import sys, maestro_jax.rewards.equation_server\n"
        "unwanted = ('jax', 'flax', 'numpy', 'torch', 'maestro_jax.train')\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
