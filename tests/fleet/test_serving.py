"""`experts up` and `experts status`, with real processes on the loopback interface."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from maestro_jax.errors import EXIT_CONFIG, ConfigError
from maestro_jax.fleet import serving
from maestro_jax.fleet.serving import servers_of
from maestro_jax.registry.description.config import ExpertConfig, RegistryConfig

ROOT = Path(__file__).parents[2]
SERVER = str(Path(__file__).with_name("toy_server.py"))
SECONDS = 60.0  # far above what is needed: a hang fails instead of hanging the suite


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pids(mark: str) -> set[int]:
    """Processes with the mark on their command line."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_text().split("\0"):
                found.add(int(path.parent.name))
    return found


def all_gone(mark: str) -> bool:
    """Whether none is left; one that was killed may take a moment to go."""
    end = time.monotonic() + SECONDS
    while (left := pids(mark)) and time.monotonic() < end:
        time.sleep(0.01)
    return not left


class Job:
    """The command with servers of its own, and what it says."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.mark = uuid.uuid4().hex
        self.config = directory / "config.py"
        self.process: subprocess.Popen[str] | None = None

    def write(self, *experts: dict[str, Any]) -> None:
        lines = (
            "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'registry': {"
            f"'experts': {experts!r}, 'services': (), 'skills': ({{'name': 'S', 'stages': ("
            "{'kind': 'ask', 'output': 'a', 'prompt': '{question}'},)},)}}, convert_dict=True)\n"
        )
        self.config.write_text(lines)

    def expert(self, name: str, *behaviour: str, port: int = 0) -> dict[str, Any]:
        serve = (sys.executable, SERVER, "{port}", self.mark, *behaviour)
        return {
            "name": name,
            "description": "toy",
            "endpoints": (f"http://127.0.0.1:{port or free_port()}/v1",),
            "model": "toy",
            "serve": serve,
        }

    def start(self, action: str, *more: str) -> IO[str]:
        """Its output, line by line as it comes."""
        command = [sys.executable, "-m", "maestro_jax.experts", action, f"--config={self.config}", *more]
        pipe = subprocess.PIPE
        flags = [f"--logs={self.directory / 'logs'}"]
        self.process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_signals
        )
        assert self.process.stdout is not None
        return self.process.stdout

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Exit code, what else it said, and its errors; sends the signal first, if there is one."""
        assert self.process is not None
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


def heed_signals() -> None:
    """As in a terminal: what is started by nohup, or behind it, ignores some, and `up` leaves it so."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.communicate()
    for pid in pids(made.mark):
        os.kill(pid, signal.SIGKILL)


def wait_for(lines: IO[str], *parts: str) -> str:
    """The first line with all the parts."""
    for line in lines:
        if all(part in line for part in parts):
            return line
    raise AssertionError(f"it ended without saying {parts}")


# ---- up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_servers_come_up_and_nothing_is_left_behind(job: Job, number: int) -> None:
    job.write(job.expert("A"), job.expert("B", "slow"))
    lines = job.start("up")
    wait_for(lines, "ready after", "(2 of 2 servers)")
    assert len(pids(job.mark)) == 4  # two servers with a child each
    code, out, err = job.end(number)
    assert code == 0, err
    assert out.count(": stopped") == 2 and out.endswith("all servers have ended\n")
    assert all_gone(job.mark)


def test_a_server_that_dies_is_started_again_and_its_children_go(job: Job) -> None:
    expert = job.expert("A")
    job.write(expert)
    lines = job.start("up")
    wait_for(lines, "ready after")
    before = pids(job.mark)
    with urllib.request.urlopen(f"{expert['endpoints'][0]}/pid", timeout=SECONDS) as reply:
        os.kill(int(reply.read()), signal.SIGKILL)
    assert "code -9" in wait_for(lines, "A 127.0.0.1", "ended", "again in 1 s")
    wait_for(lines, "ready after")
    after = pids(job.mark)
    assert len(after) == 2 and not after & before
    job.end(signal.SIGTERM)
    assert all_gone(job.mark)


def test_a_server_that_dies_at_once_is_started_less_and_less_often(job: Job) -> None:
    job.write(job.expert("A", "dies"))
    lines = job.start("up")
    for pause in (1, 2):
        assert "'no memory left on the device'" in wait_for(lines, "ended with code 1", f"again in {pause} s")
    began = time.monotonic()
    assert job.end(signal.SIGTERM)[0] == 0
    assert time.monotonic() - began < SECONDS / 2


def test_a_stubborn_server_is_killed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STOP_SECONDS", 0.2)
    server = serving.Server("A", *served(job.expert("A", "stubborn")))

    def say(line: str) -> None:
        if "ready after" in line:
            supervisor.stop()

    supervisor = serving.Supervisor([server], job.directory, say, lambda: None)
    asyncio.run(asyncio.wait_for(supervisor.run(), SECONDS))
    assert all_gone(job.mark)


def served(expert: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """URL and command of an entry."""
    [server] = servers_of(RegistryConfig((ExpertConfig(**expert),), (), ()))
    return server.url, server.command


def test_a_command_that_is_not_there_is_said_before_any_is_started(job: Job) -> None:
    job.write(job.expert("A"), job.expert("B") | {"serve": ("no-such-command", "{port}")})
    job.start("up")
    code, out, err = job.end()
    assert (code, out) == (EXIT_CONFIG, "")
    assert err == (
        "error: expert \"B\": serve starts 'no-such-command', which is no program of this machine; install it, put it "
        "on PATH or correct serve\n"
    )


def test_a_command_that_cannot_be_started_ends_the_others(job: Job) -> None:
    program = job.directory / "program"
    program.write_bytes(b"\x7fELF and no more")
    program.chmod(0o755)
    job.write(job.expert("A"), job.expert("B") | {"serve": (str(program), "{port}")})
    job.start("up")
    code, _, err = job.end()
    assert code == EXIT_CONFIG
    assert err.startswith(f"error: expert \"B\": '{program}' cannot be started (Exec format error)")
    assert all_gone(job.mark)


@pytest.mark.parametrize(
    ("registry", "says"),
    [
        (
            "{'registry': {'experts': ({'name': 'A', 'description': '', 'serv': ()},)}}",
            'unknown key registry.experts["A"].serv; did you mean registry.experts["A"].serve?',
        ),
        ("{'seed': 0}", "registry needs at least one shown expert"),
    ],
)
def test_what_the_config_shows_is_said_in_a_line(job: Job, registry: str, says: str) -> None:
    job.config.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({registry})\n"
    )
    job.start("up")
    code, out, err = job.end()
    assert (code, out) == (EXIT_CONFIG, "") and err.count("\n") == 1 and says in err


def test_logs_that_cannot_be_written_are_an_error(job: Job) -> None:
    job.write(job.expert("A"))
    (job.directory / "logs").write_text("a file")
    job.start("up")
    code, out, err = job.end()
    assert (code, out) == (EXIT_CONFIG, "") and "logs cannot be made (File exists); name another" in err


def test_an_address_that_is_taken_is_an_error(job: Job) -> None:
    job.write(job.expert("A"))
    wait_for(job.start("up"), "ready after")
    first, job.process = job.process, None
    job.start("up")
    code, _, err = job.end()
    assert code == EXIT_CONFIG and "something answers at http://127.0.0.1:" in err and "stop that one" in err
    job.process = first
    job.end(signal.SIGTERM)


# ---- status ------------------------------------------------------------------------------------------------


def test_status_says_who_answers(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # reserves the port, and accepts nobody
        silent.close()
        job.write(job.expert("A"), job.expert("Away", port=free_port()) | {"serve": ()})
        wait_for(job.start("up"), "(1 of 1 servers)")
    up, job.process = job.process, None
    job.start("status")
    code, out, _ = job.end()
    assert code == 1
    assert "A 127.0.0.1:" in out and ": ready" in out and "no answer (" in out
    job.process = up
    job.end(signal.SIGTERM)


def test_servers_for_other_machines_are_published_while_they_answer(job: Job) -> None:
    port, published = free_port(), job.directory / "published"
    job.write(job.expert("A", "{host}", port=port), job.expert("Away") | {"serve": ()})
    wait_for(job.start("up", f"--publish={published}", "--host=127.0.0.2"), f"published in {published}/127.0.0.2.json")
    away = f"http://127.0.0.2:{port}/v1"  # as another machine would: that address, and not the config's
    assert json.loads((published / "127.0.0.2.json").read_text()) == {"A": [away]}
    with urllib.request.urlopen(f"{away}/models", timeout=SECONDS) as answer:
        assert answer.status == 200
    assert job.end(signal.SIGTERM)[0] == 0
    assert not list(published.iterdir())


def test_what_to_do_has_to_be_said(job: Job) -> None:
    job.write(job.expert("A"))
    job.start("down")
    code, _, err = job.end()
    assert code == EXIT_CONFIG and "one of up, status" in err


def test_without_serve_there_is_nothing_to_start(job: Job) -> None:
    job.write(job.expert("A") | {"serve": ()})
    job.start("up")
    code, _, err = job.end()
    assert code == EXIT_CONFIG and "no expert of the registry has a serve command" in err


# ---- config ------------------------------------------------------------------------------------------------


def registry(**fields: object) -> RegistryConfig:
    plain = {"endpoints": ("http://localhost:8000/v1", "http://localhost:8001/v1"), "model": "m"}
    serve = ("vllm", "serve", "{model}", "--host", "{host}", "--port", "{port}", '--json={"a": 1}')
    return RegistryConfig((ExpertConfig("E", "", **(plain | {"serve": serve} | fields)),), (), ())


def test_a_command_is_filled_in_for_each_endpoint() -> None:
    found = servers_of(registry())
    rest = ("--host", "localhost", "--port")
    assert [server.command for server in found] == [
        ("vllm", "serve", "m", *rest, port, '--json={"a": 1}') for port in ("8000", "8001")
    ]
    assert [server.log_name for server in found] == ["E_localhost_8000.log", "E_localhost_8001.log"]


def test_an_endpoint_of_two_experts_has_one_server() -> None:
    one = registry().experts
    assert len(servers_of(RegistryConfig((*one, *registry(serve=()).experts), (), ()))) == 2


WRONG: list[tuple[Callable[[], RegistryConfig], str]] = [
    (lambda: registry(serve=("run", "{port}", "{ports}")), r"serve has \{ports\}; it can have"),
    (lambda: registry(serve=("run",)), r"let it take \{port\}"),
    (lambda: registry(endpoints=()), "serve but no endpoints"),
    (lambda: registry(endpoints=("http://example.org:80/v1",)), "is another; remove serve"),
    (lambda: registry(endpoints=("http://localhost/v1",)), "has no port"),
]


@pytest.mark.parametrize(("made", "says"), WRONG)
def test_commands_that_cannot_be_meant(made: Callable[[], RegistryConfig], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        servers_of(made())


def test_two_commands_for_one_endpoint_are_refused() -> None:
    other = registry(serve=("other", "{port}")).experts
    with pytest.raises(ConfigError, match="by other commands; keep one"):
        servers_of(RegistryConfig((*registry().experts, *other), (), ()))
