"""Trackers: each gets every step, once, read back with the package's own reader; none can stop or slow a run.

mlflow and trackio want other versions than requirements.txt pins: docs/development.md says how to run these tests for
them in an environment of its own.
"""

import importlib.util
import json
import struct
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maestro_jax.errors import ConfigError
from maestro_jax.observe.config import TrackersConfig
from maestro_jax.observe.metrics import MetricsWriter, read_metrics
from maestro_jax.observe.trackers import _BUILT_IN, QUEUE, Trackers, check_trackers

Numbers = dict[int, dict[str, float]]
WAIT = {"step": 3, "waiting/Glyph-Reader": 0.5}


def row(step: int) -> dict[str, Any]:
    return {"step": step, "reward": np.float32(step / 4), "marked/Chart-Lens": 0.125, "right": True, "gap": None}


def written(path: Path) -> Numbers:
    """What metrics.jsonl has."""
    rows = {row.pop("step"): row for row in read_metrics(path)}
    return {step: {k: float(v) for k, v in values.items() if v is not None} for step, values in rows.items()}


# ---- the packages' readers: (work directory, id of the run) → step → numbers --------------------------------


def tensorboard(workdir: Path, run: str) -> Numbers:
    from tensorboardX.proto.event_pb2 import Event

    found: Numbers = {}
    for path in sorted((workdir / f"trackers/tensorboard/run-{run}").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                assert value.tag not in found.get(event.step, {}), "twice"
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Of a file in LevelDB's log format: blocks of 32 KiB with parts of records, after a header of its own."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb(workdir: Path, run: str) -> Numbers:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Numbers = {}
    for path in sorted((workdir / "trackers/wandb").glob(f"offline-run-*-{run}/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(items["_step"])
                assert step not in found, "twice"
                found[step] = {name: float(x) for name, x in items.items() if not name.startswith("_")}
    return found


def mlflow(workdir: Path, run: str) -> Numbers:
    from mlflow import MlflowClient

    client = MlflowClient((workdir / "trackers/mlruns").as_uri())
    experiment = client.get_experiment_by_name("maestro")
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.data.params == {"seed": "3"} and only.info.status == "FINISHED"
    found: Numbers = {}
    for name in only.data.metrics:
        for metric in client.get_metric_history(only.info.run_id, name):
            assert name not in found.get(metric.step, {}), "twice"
            found.setdefault(metric.step, {})[name] = metric.value
    return found


def trackio(workdir: Path, run: str) -> Numbers:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("maestro", f"run-{run}")
    assert len({log["step"] for log in logs}) == len(logs)
    return {log.pop("step"): {k: float(v) for k, v in log.items() if k != "timestamp"} for log in logs}


READERS: dict[str, Callable[[Path, str], Numbers]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "trackio": trackio,
}


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_gets_every_step_of_a_run_that_is_interrupted_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(_BUILT_IN[name].module) is None:
        pytest.skip(f"{_BUILT_IN[name].package} is not installed (docs/development.md)")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    options = {"wandb": {"mode": "offline"}} if name == "wandb" else {}
    config, workdir, lines = TrackersConfig(use=(name,), options=options), tmp_path / "run", list[str]()
    check_trackers(config)
    starts = [[*map(row, range(3)), WAIT], [row(2), row(3), row(4)]]  # the second goes on from step 1
    for rows in starts:
        trackers = Trackers(config, workdir, {"seed": "3"}, lines.append)
        with MetricsWriter(workdir / "metrics.jsonl", trackers.write) as metrics:
            metrics.truncate_after(1)
            for each in rows:
                metrics.write(each)
        trackers.close(300.0)
    state = json.loads((workdir / f"trackers/{name}.json").read_text())
    found, wanted = READERS[name](workdir, state["id"]), written(workdir / "metrics.jsonl")
    deadline = time.monotonic() + 60
    while len(found) < len(wanted) and time.monotonic() < deadline:  # wandb's own process may still be writing
        time.sleep(0.1)
        found = READERS[name](workdir, state["id"])
    assert lines == [] and state["step"] == 4 and sorted(found) == [0, 1, 2, 3, 4]
    assert found == {step: pytest.approx(numbers) for step, numbers in wanted.items()}


# ---- a tracker of one's own --------------------------------------------------------------------------------

MODULE = """
import json, os, sys, threading

class Kept:
    def __init__(self, run):
        self.path = run.directory / "kept.jsonl"
        self.own = run.options.get("own")
    def write(self, step, numbers):
        with open(self.path, "a") as file:
            file.write(json.dumps([step, self.own, numbers]) + "\\n")
    def close(self):
        pass

class CannotBegin(Kept):
    def __init__(self, run):
        sys.exit("no server")

class CannotWrite(Kept):
    def write(self, step, numbers):
        raise OSError("no network")

class Hangs(Kept):
    def write(self, step, numbers):
        threading.Event().wait()

class HangsAtTheEnd(Kept):
    def close(self):
        threading.Event().wait()

class CannotEnd(Kept):
    def close(self):
        raise OSError("no network")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trackers.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))


def run(workdir: Path, name: str, steps: int, flush_seconds: float = 60.0, **options: Any) -> list[str]:
    """What is told by a run with one tracker."""
    lines: list[str] = []
    config = TrackersConfig(use=(f"own_trackers:{name}",) if name else (), options={name: options} if options else {})
    check_trackers(config)
    trackers = Trackers(config, workdir, {}, lines.append)
    with MetricsWriter(workdir / "metrics.jsonl", trackers.write) as metrics:
        for step in range(steps):
            metrics.write(row(step))
    trackers.close(flush_seconds)
    return lines


def kept(workdir: Path) -> list[Any]:
    return [json.loads(line) for line in (workdir / "trackers/kept.jsonl").read_text().splitlines()]


def test_a_class_of_ones_own_is_a_tracker(own: None, tmp_path: Path) -> None:
    assert run(tmp_path / "run", "Kept", 2, own=5) == []
    numbers = {"reward": 0.25, "marked/Chart-Lens": 0.125, "right": 1.0}
    assert kept(tmp_path / "run")[1] == [1, 5, numbers]


def test_a_tracker_that_hangs_keeps_no_other_from_its_end(own: None, tmp_path: Path) -> None:
    """They were closed one after the other; the second had no time left."""
    lines, workdir = list[str](), tmp_path / "run"
    trackers = Trackers(TrackersConfig(use=("own_trackers:Hangs", "own_trackers:Kept")), workdir, {}, lines.append)
    trackers.write(row(0))
    trackers.close(0.5)
    assert lines == ["tracker Hangs does not come to an end; it lacks what came after step -1"]
    assert [step for step, *_ in kept(workdir)] == [0]


def test_steps_that_a_tracker_lacks_are_sent_when_the_run_goes_on(own: None, tmp_path: Path) -> None:
    """Those lost in a kill, and all of them to a tracker that is named later."""
    run(tmp_path / "run", "", 4)
    run(tmp_path / "run", "Kept", 0)
    assert [step for step, _, _ in kept(tmp_path / "run")] == [0, 1, 2, 3]
    (tmp_path / "run/metrics.jsonl").unlink()  # and a run that begins anew is another one
    run(tmp_path / "run", "Kept", 2)
    assert [step for step, _, _ in kept(tmp_path / "run")] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CannotBegin", ["tracker CannotBegin cannot be used, the run goes on without it (SystemExit: no server)"]),
        (
            "CannotWrite",
            [
                "tracker CannotWrite fails at step 0, the run goes on (OSError: no network)",
                "tracker CannotWrite lacks 3 steps; metrics.jsonl has all of them",
            ],
        ),
        ("Hangs", ["tracker Hangs does not come to an end; it lacks what came after step -1"]),
        ("HangsAtTheEnd", ["tracker HangsAtTheEnd does not come to an end; it lacks what came after step 2"]),
        ("CannotEnd", ["tracker CannotEnd fails at the end (OSError: no network)"]),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_changes_nothing(
    name: str, says: list[str], own: None, tmp_path: Path
) -> None:
    run(tmp_path / "without", "", 3)
    hangs = name.startswith("Hangs")
    began = time.monotonic()
    lines = run(tmp_path / "run", name, 3, 2.0 if hangs else 60.0)
    assert [line for line in lines if "lacks 3" not in line or name == "CannotWrite"] == says
    assert not hangs or time.monotonic() - began < 60
    metrics = [(tmp_path / directory / "metrics.jsonl").read_bytes() for directory in ("without", "run")]
    assert metrics[0] == metrics[1]


def test_a_queue_that_is_full_loses_steps_and_says_so_once(own: None, tmp_path: Path) -> None:
    lines = run(tmp_path / "run", "Hangs", QUEUE + 10, 0.5)
    full = f"tracker Hangs is too slow: {QUEUE} steps wait for it, and further ones go lost"
    assert lines == [full, "tracker Hangs does not come to an end; it lacks what came after step -1"]
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == QUEUE + 10


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_mistakes_are_found_before_a_run(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'tensorbord', which is no tracker; did you mean \"tensorboard\"?"):
        check_trackers(TrackersConfig(use=("tensorbord",)))
    with pytest.raises(ConfigError, match='use tensorboard, wandb, mlflow, trackio, or "package.module:Class"'):
        check_trackers(TrackersConfig(use=("x",)))
    with pytest.raises(ConfigError, match='"own_trackers:Nobody" does not import .*AttributeError'):
        check_trackers(TrackersConfig(use=("own_trackers:Nobody",)))
    with pytest.raises(ConfigError, match="options.wandb belongs to no tracker in config.trackers.use .Kept."):
        check_trackers(TrackersConfig(use=("own_trackers:Kept",), options={"wandb": {}}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match='"mlflow", whose package is missing; install it with `pip install mlflow-'):
        check_trackers(TrackersConfig(use=("mlflow",)))
