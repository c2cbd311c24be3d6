"""Sandboxes: what programs get, what ends them, and what they cannot reach."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.sandbox import choose, process
from maestro_jax.sandbox.choose import make_sandbox
from maestro_jax.sandbox.interface import Limits, Ran, RanStatus, Sandbox
from maestro_jax.sandbox.process import ProcessSandbox
from tests.sandbox import escapes

LIMITS = Limits(cpu_seconds=0.5, wall_seconds=300.0, memory_bytes=96 << 20, output_bytes=5000)
GIVEN = {"given.txt": b"given", "folder/number.py": b"VALUE = 7"}


@pytest.fixture
def closed(sandbox: Sandbox) -> Sandbox:
    """A sandbox that promises more than limits."""
    if sandbox.name == "unsafe_process":
        pytest.skip("a bare process is open to the host; that is what its name says")
    return sandbox


def ran(sandbox: Sandbox, program: str, files: Mapping[str, bytes] = GIVEN, limits: Limits = LIMITS) -> Ran:
    return asyncio.run(sandbox.run(program, files, limits))


# ---- what a program gets -----------------------------------------------------------------------------------


def test_what_a_program_prints_comes_back(sandbox: Sandbox) -> None:
    found = ran(sandbox, "import sys; print('out', 1 + 1); print('err', file=sys.stderr)")
    assert (found.stdout, found.stderr, found.status) == ("out 2\n", "err\n", RanStatus.OK)
    assert found.seconds > 0


def test_a_program_reads_and_imports_its_files(sandbox: Sandbox) -> None:
    program = "from folder.number import VALUE; print(VALUE, open('given.txt').read())"
    assert ran(sandbox, program).stdout == "7 given\n"


def test_an_error_comes_with_its_line(sandbox: Sandbox) -> None:
    found = ran(sandbox, "def f(x):\n    return 1 / x\nf(0)")
    assert found.status is RanStatus.ERROR
    assert "main.py" in found.stderr and "return 1 / x" in found.stderr and "ZeroDivisionError" in found.stderr


def test_the_exit_code_decides(sandbox: Sandbox) -> None:
    assert ran(sandbox, "raise SystemExit(0)").status is RanStatus.OK
    assert ran(sandbox, "raise SystemExit(1)").status is RanStatus.ERROR


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", ".", "main.py", "a\0b"])
def test_names_of_files_stay_inside(sandbox: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match="use another"):
        ran(sandbox, "", {name: b""})


def test_a_text_that_is_no_unicode_is_a_program_with_an_error(sandbox: Sandbox) -> None:
    assert ran(sandbox, "print('\udcff')").status in (RanStatus.OK, RanStatus.ERROR)


def test_standard_input_is_what_is_given(sandbox: Sandbox) -> None:
    program = "import sys; print([sys.stdin.read()])"
    assert ran(sandbox, program).stdout == "['']\n"
    assert asyncio.run(sandbox.run(program, {}, LIMITS, stdin=b"one\ntwo")).stdout == "['one\\ntwo']\n"


def test_output_ends_at_the_same_byte(sandbox: Sandbox) -> None:
    for _ in range(2):
        found = ran(sandbox, "for i in range(10**5): print(i)")
        assert found.status is RanStatus.OUTPUT
        assert found.stdout == "".join(f"{i}\n" for i in range(10**4))[: LIMITS.output_bytes]


# ---- time --------------------------------------------------------------------------------------------------


def test_wall_time_ends_a_program(sandbox: Sandbox) -> None:
    limits = dataclasses.replace(LIMITS, cpu_seconds=1000.0, wall_seconds=1.0)
    found = ran(sandbox, "while True: pass", limits=limits)
    assert found.status is RanStatus.TIMEOUT
    assert 1.0 <= found.seconds < 10.0


def test_cancelling_ends_the_program(sandbox: Sandbox) -> None:
    async def cancelled() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await sandbox.run("while True: pass", {}, dataclasses.replace(LIMITS, cpu_seconds=1000.0))

    others = _children()
    asyncio.run(cancelled())
    assert _children() <= others, "a process was left behind"


def test_a_program_is_not_judged_by_the_signal_that_stops_the_run(sandbox: Sandbox) -> None:
    """Slurm, for one, sends SIGTERM to all processes of a job."""
    limits = dataclasses.replace(LIMITS, cpu_seconds=300.0)
    program = "for _ in range(3_000_000): pass\nprint('done')"
    before = _children()

    async def run() -> Ran:
        running = asyncio.ensure_future(sandbox.run(program, {}, limits))
        while not (started := [int(pid) for pid in _children() - before]) or not _ignores(started[0], signal.SIGTERM):
            assert not running.done(), "it never ignored SIGTERM"
            await asyncio.sleep(0.005)
        for pid in process._family(started[0]):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGTERM)
        return await running

    assert asyncio.run(run()).stdout == "done\n"


def test_the_event_loop_goes_on(sandbox: Sandbox) -> None:
    async def main() -> int:
        work = asyncio.create_task(sandbox.run("x = sum(range(10**6))", {}, LIMITS))
        turns = 0
        while not work.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    assert asyncio.run(main()) > 5


def test_waiting_for_a_turn_is_no_time_of_the_program() -> None:
    limits = dataclasses.replace(LIMITS, wall_seconds=1.0)

    async def main() -> list[Ran]:
        sandbox = make_sandbox("unsafe_process")
        assert isinstance(sandbox, ProcessSandbox)
        sandbox._free = asyncio.Semaphore(1)
        return await asyncio.gather(*(sandbox.run("import time; time.sleep(0.6)", {}, limits) for _ in range(3)))

    found = asyncio.run(main())
    assert [one.status for one in found] == [RanStatus.OK] * 3
    assert all(one.seconds < 1.2 for one in found)


@contextlib.contextmanager
def on_a_busy_core(spinning: int) -> Iterator[None]:
    """This process and what it starts share one core with so many others."""
    free = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(free)})
    # A session each: kernels that group by session share a core among sessions first.
    spin = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(spin, stdout=subprocess.PIPE, start_new_session=True) for _ in range(spinning)]
    try:
        for other in others:
            assert other.stdout is not None and other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()
        os.sched_setaffinity(0, free)


def test_a_busy_machine_changes_no_verdict(sandbox: Sandbox) -> None:
    work, asleep = "for _ in range(3 * 10**6): pass", "import time; time.sleep(1000)"
    limits = dataclasses.replace(LIMITS, cpu_seconds=3.0)
    with on_a_busy_core(spinning=0):
        alone = ran(sandbox, work, limits=limits)
        assert alone.status is RanStatus.OK
    with on_a_busy_core(spinning=4):
        short = dataclasses.replace(limits, wall_seconds=2 * alone.seconds)  # it takes five times as long now
        assert ran(sandbox, work, limits=short).status is RanStatus.OK
        # Who sleeps does not wait for a core; in wasm it takes no time.
        expected = RanStatus.OK if sandbox.name == "wasm" else RanStatus.TIMEOUT
        assert ran(sandbox, asleep, limits=dataclasses.replace(LIMITS, wall_seconds=1.0)).status is expected


def test_a_program_that_hardly_gets_a_core_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    monkeypatch.setattr(process, "_waited", lambda pid: time.monotonic() - began)
    bare = make_sandbox("unsafe_process")
    found = ran(bare, "import time; time.sleep(1000)", limits=dataclasses.replace(LIMITS, wall_seconds=0.05))
    assert found.status is RanStatus.UNAVAILABLE and 0.5 <= found.seconds < 10.0


def test_a_program_that_starts_late_is_asked_how_long_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine bubblewrap may be looked at before it has started the program, and waits itself."""
    began, program = time.monotonic(), 2**30  # a process id that nobody has
    looked: list[int] = []

    def waited(pid: int) -> float:
        looked.append(pid)
        return time.monotonic() - began if pid == program else 0.03

    monkeypatch.setattr(process, "_family", lambda pid: frozenset([pid, program] if looked else [pid]))
    monkeypatch.setattr(process, "_waited", waited)
    limits = dataclasses.replace(LIMITS, wall_seconds=0.05)
    found = ran(make_sandbox("unsafe_process"), "import time; time.sleep(1000)", limits=limits)
    assert found.status is RanStatus.UNAVAILABLE


def test_in_wasm_sleeping_costs_nothing_and_clocks_are_made_up(sandbox: Sandbox) -> None:
    if sandbox.name != "wasm":
        pytest.skip("other back ends see the machine's clock")
    program = (
        "import os, random, select, time\n"
        "start = time.time()\ntime.sleep(3600)\nselect.select([], [], [], 60)\n"
        "print(time.time() - start, time.monotonic(), random.random(), os.urandom(4), hash('x'), id(start))"
    )
    first, second = ran(sandbox, program), ran(sandbox, program)
    assert first.stdout == second.stdout and first.stdout.startswith("3660")
    assert first.seconds < LIMITS.wall_seconds


# ---- escapes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, socket.socket]]:
    """A file and a listening socket that no program may reach, and a secret in the environment."""
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("canary")
    os.environ["MAESTRO_TEST_KEY"] = "canary"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield str(secret), server
    del os.environ["MAESTRO_TEST_KEY"]


def aimed(program: str, secret: str, port: int) -> str:
    """A program of the corpus with its placeholders replaced."""
    return program.replace("SECRET", secret).replace("MADE", made_by_escapes(secret)).replace("PORT", str(port))


def made_by_escapes(secret: str) -> str:
    return str(Path(secret).with_name("made"))


async def escaping(sandbox: Sandbox, secret: str, port: int) -> dict[str, Ran]:
    """What became of every program of the corpus."""
    programs = [aimed(text, secret, port) for text, _ in escapes.ENDS.values()]
    found = await asyncio.gather(*(sandbox.run(program, GIVEN, LIMITS) for program in programs))
    return dict(zip(escapes.ENDS, found, strict=True))


def test_nothing_gets_out(closed: Sandbox, outside: tuple[str, socket.socket]) -> None:
    secret, server = outside
    others = _children()
    found = asyncio.run(escaping(closed, secret, server.getsockname()[1]))
    for name, (_, statuses) in escapes.ENDS.items():
        for text in (found[name].stdout, found[name].stderr):
            # A program that fails is quoted in its traceback.
            assert "ESCAPED" not in text.replace("print('ESCAPED')", "") and "canary" not in text, (name, found[name])
            assert len(text) <= LIMITS.output_bytes, name
        assert found[name].status in statuses, (name, found[name])
    with pytest.raises(BlockingIOError):  # nobody has called
        server.accept()
    assert not Path(made_by_escapes(secret)).exists()
    assert Path(secret).read_text() == "canary"
    assert _children() <= others


@pytest.mark.slow
def test_verdicts_are_the_same_again(closed: Sandbox, outside: tuple[str, socket.socket]) -> None:
    secret, server = outside

    async def twice() -> list[dict[str, Ran]]:
        return [await escaping(closed, secret, server.getsockname()[1]) for _ in range(2)]

    first, second = asyncio.run(twice())
    for name, ran in first.items():
        assert second[name].status is ran.status, name
        if closed.name == "wasm":
            assert second[name] == dataclasses.replace(ran, seconds=second[name].seconds), name


def test_the_programs_would_get_out_of_no_sandbox(outside: tuple[str, socket.socket]) -> None:
    """The corpus has teeth: a bare process is left by what stays inside elsewhere."""
    secret, server = outside
    bare = make_sandbox("unsafe_process")
    names = ("read a file by its path", "connect to a server", "fork", "a thread", "write elsewhere")
    for name in names:
        program = aimed(escapes.REFUSED[name], secret, server.getsockname()[1])
        assert "ESCAPED" in ran(bare, program).stdout, name
    Path(made_by_escapes(secret)).unlink()
    with server.accept()[0]:
        pass


def test_limits_hold_in_a_bare_process_too(sandbox: Sandbox) -> None:
    names = ("a loop without end", "memory, piece by piece", "standard output", "ignoring signals")
    began = time.monotonic()
    for name in names:
        program, statuses = escapes.ENDED[name]
        assert ran(sandbox, program).status in statuses, name
    assert time.monotonic() - began < LIMITS.wall_seconds


# ---- choice ------------------------------------------------------------------------------------------------


def test_an_unknown_sandbox_is_named() -> None:
    with pytest.raises(ConfigError, match="'docker' is unknown; use one of auto, wasm"):
        make_sandbox("docker")


def test_auto_never_takes_the_bare_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "is_installed", lambda: False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="install bubblewrap"):
        make_sandbox("auto")


def _children() -> set[str]:
    """Processes that this one has started and that still run; other tests' servers among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state = path.read_text().rpartition(")")[2].split()
            if int(state[1]) == os.getpid() and state[0] != "Z":
                found.add(path.parent.name)
    return found


def _ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)
