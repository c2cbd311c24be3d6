"""Counters of experts, and the caps of a run."""

import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maestro_jax.registry.description.config import LimitsConfig
from maestro_jax.registry.description.interface import Reply, ServiceResult
from maestro_jax.registry.description.reading import parse_registry
from maestro_jax.registry.dispatch import Dispatcher, Registry
from maestro_jax.registry.record.journal import Journal
from maestro_jax.registry.record.metering import ExpertCounter, Latencies, LimitError, Spending
from maestro_jax.strict_json import decode_line
from maestro_jax.suite.demonstrations import make_calls
from maestro_jax.types import Call, Status, Task, Usage
from tests.registry.servers import ChatServer, answer, send

Raw = Callable[..., dict[str, Any]]
CALL = Call("Echo-One", "Plain_Solver", "the dots")


def test_quantiles_are_known_to_a_percent() -> None:
    latencies, draw = Latencies(), random.Random(0)
    seconds = sorted(draw.lognormvariate(0.0, 2.0) for _ in range(10_000))
    for value in seconds:
        latencies.add(value)
    for share in (0.5, 0.95, 0.99):
        assert latencies.quantile(share) == pytest.approx(seconds[int(share * 10_000) - 1], rel=0.011)


def test_quantiles_of_nothing_and_of_zero() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.5) == 0.0
    latencies.add(0.0)
    assert latencies.quantile(0.99) == pytest.approx(0.0, abs=1e-5)


def test_a_counter_adds_up() -> None:
    counter = ExpertCounter()
    counter.add(Reply("x", Status.OK, Usage(10, 2, 0.5), 1.0))
    counter.add(Reply("", Status.TIMEOUT, Usage(), 3.0))
    found = counter.to_json()
    assert (found["calls"], found["success"], found["statuses"]) == (2, 0.5, {"OK": 1, "TIMEOUT": 1})
    assert (found["prompt_tokens"], found["completion_tokens"], found["price"]) == (10, 2, 0.5)
    assert found["p50_seconds"] == pytest.approx(1.0, rel=0.01) and found["p99_seconds"] == pytest.approx(3.0, rel=0.01)


def spend(limits: LimitsConfig) -> tuple[int, Spending]:
    """How many requests of 15 tokens and a quarter of a dollar may go out, of a hundred."""
    spending, begun = Spending(limits), 0
    for _ in range(100):
        if spending.begin():
            begun += 1
            spending.add(Usage(10, 5, 0.25))
    return begun, spending


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        (LimitsConfig(), 100),
        (LimitsConfig(calls=7), 7),
        (LimitsConfig(tokens=31), 3),
        (LimitsConfig(price=1.0), 4),
        (LimitsConfig(calls=50, tokens=30), 2),
    ],
)
def test_a_cap_stops_further_requests(limits: LimitsConfig, allowed: int) -> None:
    begun, spending = spend(limits)
    assert begun == allowed
    if allowed < 100:
        with pytest.raises(LimitError):
            spending.check()


def test_the_error_names_the_cap_and_the_cure() -> None:
    _, spending = spend(LimitsConfig(price=1.0))
    with pytest.raises(
        LimitError, match=r"cap config\.registry\.limits\.price=1\.0; .*raise config\.registry\.limits\.price"
    ):
        spending.check()


def test_a_cap_that_is_met_but_not_exceeded_stops_nothing() -> None:
    spending = Spending(LimitsConfig(calls=1))
    assert spending.begin()
    spending.check()


# ---- in the registry ---------------------------------------------------------------------------------------


def test_an_in_process_expert_is_capped_too(raw: Raw, specialists: ModuleType) -> None:
    dispatcher = Dispatcher(Registry(parse_registry(raw(limits={"calls": 3}))))
    try:
        tasks = [(_task(), Call("Echo-One", "Plain_Solver", str(number))) for number in range(10)]
        with pytest.raises(LimitError, match="limits.calls=3"):
            make_calls(dispatcher, tasks, 30.0, lambda count: None)
    finally:
        dispatcher.close()
    assert specialists.Echo.asked <= 3


def _task() -> Task:
    return Task("t", "how many?", (), (), "counting")


def test_refused_calls_come_back_as_infrastructure_failures(raw: Raw) -> None:
    dispatcher = Dispatcher(Registry(parse_registry(raw(limits={"calls": 1}))))
    for ticket in range(3):
        dispatcher.submit(ticket, Call("Echo-One", "Plain_Solver", str(ticket)), "q", (), 30.0)
    found: dict[int, Any] = {}
    while len(found) < 3:
        assert dispatcher.wait(10.0)
        found.update(dispatcher.collect())
    dispatcher.close()
    assert sorted(o.status for o in found.values()) == [Status.OK, Status.UNAVAILABLE, Status.UNAVAILABLE]
    with pytest.raises(LimitError):
        dispatcher.check()


def test_a_run_that_goes_on_has_spent_what_its_journal_holds(raw: Raw, tmp_path: Path) -> None:
    """All of it: also what was asked in sections that a later life began again."""
    path = tmp_path / "journal.jsonl"

    def live(limits: dict[str, float], asked: int) -> Spending:
        """A process that begins step 2 again and asks so often for what no cache has; killed, its caches are lost."""
        journal = Journal(str(path))
        registry = Registry(parse_registry(raw(limits=limits)), journal=journal)
        journal.begin("step 2")

        async def scenario() -> None:
            for number in range(asked):
                await registry.call(Call("Echo-One", "Text_Solver", ""), str(number), (b"png",), 30.0)
            await registry.close()

        asyncio.run(scenario())
        journal.close()
        return registry.spending

    first = live({"calls": 100}, 3)
    with open(path, "ab") as file:
        file.write(b'{"kind": "request", "name": "Echo-One", "usa')  # torn by the kill
    second = live({"calls": 100}, 2)
    assert second.calls == first.calls + 2 == 5  # the service of this process is none
    assert second.usage.prompt_tokens > first.usage.prompt_tokens > 0
    assert second.usage.price == pytest.approx(5 / 3 * first.usage.price) and first.usage.price > 0
    for limits in ({"calls": 5}, {"tokens": 1}, {"price": 1.5 * first.usage.price}):
        with pytest.raises(LimitError):
            live(limits, 1)


def test_replies_from_the_cache_cost_nothing(raw: Raw) -> None:
    registry = Registry(parse_registry(raw(limits={"calls": 1})))

    async def scenario() -> None:
        for _ in range(5):
            assert (await registry.call(CALL, "q", (), 30.0)).status is Status.OK
        await registry.close()

    asyncio.run(scenario())
    report = registry.report()["Echo-One"]
    assert (report["calls"], report["cache_hits"], report["success"]) == (1, 4, 1.0)


def served(url: str, **fields: Any) -> dict[str, Any]:
    return {"name": "Served", "description": "", "endpoints": (url,), "model": "m", **fields}


def test_the_report_has_what_breakers_did(raw: Raw) -> None:
    async def scenario() -> dict[str, Any]:
        async with ChatServer(send(b"", 500)) as server:
            registry = Registry(parse_registry(raw(experts=(served(server.url),))))
            for _ in range(6):
                await registry.call(Call("Served", "Plain_Solver", "x"), "q", (), 0.2)
            await registry.close()
            return registry.report()["Served"]

    began = time.monotonic()
    report = asyncio.run(scenario())
    (changes,) = report["breakers"].values()
    ((seconds, state),) = changes
    assert state == "open" and 0.0 <= seconds <= time.monotonic() - began
    assert report["statuses"] == {"UNAVAILABLE": 6} and report["success"] == 0.0


def test_tokens_and_prices_of_servers_count(raw: Raw) -> None:
    async def scenario() -> dict[str, Any]:
        async with ChatServer(answer("42")) as server:
            expert = served(server.url, price_prompt=1.0, price_completion=5.0)
            registry = Registry(parse_registry(raw(experts=(expert,), limits={"price": 1.5e-5})))
            await registry.call(Call("Served", "Plain_Solver", "a"), "q", (), 5.0)
            with pytest.raises(LimitError, match="limits.price"):
                await registry.call(Call("Served", "Plain_Solver", "b"), "q", (), 5.0)
            await registry.close()
            return registry.report()["Served"]

    report = asyncio.run(scenario())
    assert (report["prompt_tokens"], report["completion_tokens"]) == (10, 2)
    assert report["price"] == pytest.approx(2e-5)


def test_processes_share_what_is_left_of_a_cap(raw: Raw, tmp_path: Path) -> None:
    """However many there have been, and are now."""
    first, second = Journal(str(tmp_path / "journal.jsonl")), Journal(str(tmp_path / "journal.1.jsonl"))
    config = parse_registry(raw(limits={"calls": 10}))

    async def ask(registry: Registry) -> int:
        """How often experts may be asked."""
        for number in itertools.count():
            try:
                await registry.call(Call("Echo-One", "Plain_Solver", f"{number}"), "q", (), 30.0)
            except LimitError as error:
                assert "config.registry.limits.calls=" in str(error)
                await registry.close()
                return number

    alone = Registry(parse_registry(raw(limits={"calls": 4})), journal=first)
    assert asyncio.run(ask(alone)) == 4
    pair = [Registry(config, journal=journal, processes=2) for journal in (first, second)]
    assert [asyncio.run(ask(registry)) for registry in pair] == [3, 3]
    assert asyncio.run(ask(Registry(config, journal=first))) == 0


# ---- what the journals of a run say it has spent -----------------------------------------------------------


def record(path: Path, count: int) -> None:
    """A life of a run that asks so often, a service among it, and ends well."""
    journal = Journal(str(path))
    for number in range(count):
        usage = Usage(number, 7, number / 7)
        journal.request("E", "v", "k", Reply("x" * 100, Status.OK, usage, 0.1))
    journal.request("ocr", "v", "k", ServiceResult(seconds=0.1, usage=usage))
    journal.close()


def from_byte_0(*paths: Path) -> tuple[int, Usage]:
    """By hand, from all lines that are whole."""
    lines = [line for path in paths for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    found = [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}\n")]
    asked = [line for line in found if line["kind"] == "request" and "images" not in line]
    usage = Usage()
    for line in asked:
        usage += Usage(**line["usage"])
    return len(asked), usage


def spent(path: Path) -> tuple[int, Usage]:
    """What a process that starts now hears."""
    journal = Journal(str(path))
    found = journal.spent()
    journal.close()
    return found


def test_a_start_reads_only_what_is_behind_the_last_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts and processes would multiply: each of them read every line of every journal."""
    paths = [tmp_path / name for name in ("journal.jsonl", "journal.1.jsonl")]
    for path in paths * 2:
        record(path, 500)
    with open(paths[1], "ab") as file:  # asked after the last sync, before a kill
        file.write(paths[0].read_bytes().splitlines(keepends=True)[2])
    wanted, read = from_byte_0(*paths), []

    def counted(line: bytes, decoder: Any) -> Any:
        read.append(line)
        return decode_line(line, decoder)

    monkeypatch.setattr("maestro_jax.registry.record.journal.decode_line", counted)
    assert spent(paths[0]) == wanted and wanted[0] == 2001
    assert len(read) < 10


def forge(path: Path, kept: Path) -> None:
    kept.write_text(kept.read_text().replace('"calls": 50', '"calls": 10'))


def swap(path: Path, kept: Path) -> None:
    other = path.with_name("other.jsonl")
    record(other, 90)
    other.rename(path)


def shorten(path: Path, kept: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:20]))


@pytest.mark.parametrize(
    "harm",
    [
        forge,
        swap,
        shorten,
        lambda path, kept: path.unlink(),
        lambda path, kept: kept.unlink(),
        lambda path, kept: kept.write_text(""),
        lambda path, kept: kept.write_text("[]"),
        lambda path, kept: kept.write_text('{"bytes": -5}'),
        lambda path, kept: kept.write_bytes(b"\xff\xfe"),
    ],
)
def test_totals_that_do_not_fit_the_journal_are_not_believed(tmp_path: Path, harm: Callable[..., object]) -> None:
    path = tmp_path / "journal.jsonl"
    record(path, 50)
    harm(path, tmp_path / "journal.spent.json")
    for _ in range(2):  # and a start mends them
        assert spent(path) == (from_byte_0(path) if path.exists() else (0, Usage()))


ASKS = """
import sys
from maestro_jax.registry.description.interface import Reply
from maestro_jax.registry.record.journal import Journal
from maestro_jax.types import Status, Usage
journal = Journal(sys.argv[1])
for number in range(10**9):
    journal.request("E", "v", "k", Reply("x", Status.OK, Usage(number, 7, number / 7), 0.1))
    if number % 5 == 4:
        journal.sync()
    print(number, flush=True)
"""


def test_a_kill_at_any_time_loses_no_request_and_counts_none_twice(tmp_path: Path) -> None:
    path, draw = tmp_path / "journal.jsonl", random.Random(0)
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", ASKS, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0.0, 0.05))
            process.kill()
        assert spent(path) == from_byte_0(path)
    assert from_byte_0(path)[0] > 8


def test_of_several_processes_one_reads_and_tells_the_others(raw: Raw, tmp_path: Path) -> None:
    first, second = tmp_path / "journal.jsonl", tmp_path / "journal.1.jsonl"
    record(first, 30)
    config = parse_registry(raw(limits={"calls": 100}))
    journals, told = [Journal(str(path)) for path in (first, second)], []

    def main(compute: Callable[[], Any]) -> Any:
        told.append(json.loads(json.dumps(compute())))  # as it travels
        return told[-1]

    registries = [Registry(config, journal=journals[0], processes=2, from_main=main)]
    journals[0].request("E", "v", "k", Reply("", Status.OK, Usage(1), 0.1))
    registries.append(Registry(config, journal=journals[1], processes=2, from_main=lambda compute: told[0]))
    assert [registry.spending.calls for registry in registries] == [30, 30]
    assert registries[0].spending.usage == registries[1].spending.usage == from_byte_0(first)[1] + Usage(-1)
    for registry, journal in zip(registries, journals, strict=True):
        asyncio.run(registry.close())
        journal.close()


def test_where_two_write_to_one_journal_both_count(tmp_path: Path) -> None:
    """Neither knows how much of the file is the other's."""
    path, reply = tmp_path / "journal.jsonl", Reply("x", Status.OK, Usage(3, 7, 0.1), 0.1)
    two = [Journal(str(path)) for _ in range(2)]
    for _ in range(5):
        for journal in two:
            journal.request("E", "v", "k", reply)
            journal.sync()
    for journal in two:
        journal.close()
    assert spent(path) == from_byte_0(path) and spent(path)[0] == 10
