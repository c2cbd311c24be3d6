"""Experiment trackers: the lines of metrics.jsonl come in, numbers by step go to TensorBoard, wandb, MLflow or trackio.

metrics.jsonl stays the source of truth. A tracker cannot stop or slow a run: each has a thread of its own and a bounded
queue before it. What fails there is told once, and the run goes on.

`WORKDIR/trackers/NAME.json` says which run of the tracker this is and the last step that it has. A run that goes on
sends what is missing behind that step, from metrics.jsonl, and sends no step twice.
"""

import contextlib
import difflib
import importlib.util
import itertools
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from maestro_jax.errors import ConfigError, DataError
from maestro_jax.observe.config import TrackersConfig
from maestro_jax.observe.files import read_json, write_json
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.plugins import load, one_line

QUEUE = 1000  # rows that may wait for a tracker
FLUSH_SECONDS = 30.0  # for all trackers together, when a run ends
LAST_SECONDS = 2.0  # the same, when it is stopped


class TrackedRun(NamedTuple):
    """What a tracker is told of its run.

    Attributes:
      name: as people call it.
      id: the same for all starts of the run, and no other run's.
      directory: for files; it exists.
      settings: dotted keys and printed values.
      options: of `config.trackers.options`.
    """

    project: str
    name: str
    id: str
    directory: Path
    settings: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def unique_name(self) -> str:
        return f"{self.name}-{self.id}"


class Tracker(Protocol):
    """Where the numbers of a run go. All methods, the constructor too, are called by one thread; they may raise."""

    def __init__(self, run: TrackedRun): ...

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes what was measured at a step; steps rise. A kill after it returns should lose nothing of it."""

    def close(self) -> None: ...


# ---- built in ----------------------------------------------------------------------------------------------


class TensorBoard:
    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        # Two starts within a second would write the same file.
        own = {"filename_suffix": f".{time.time_ns()}"}
        self._writer = SummaryWriter(str(run.directory / "tensorboard" / run.unique_name), **{**own, **run.options})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """By default it writes nothing to the terminal and takes nothing from there."""

    def __init__(self, run: TrackedRun):
        import wandb

        own = {"dir": str(run.directory), "settings": wandb.Settings(console="off", silent=True)}
        named = {"project": run.project, "name": run.name, "id": run.id, "resume": "allow"}
        self._run = wandb.init(**{**named, **own, "config": dict(run.settings), **run.options})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """Options: `tracking_uri`. Without it, that of the environment (MLFLOW_TRACKING_URI), else files."""

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        files = (run.directory / "mlruns").absolute().as_uri()
        uri = run.options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or files
        if uri == files:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow would like to see go
        self._client, self._metric = MlflowClient(uri), Metric
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        earlier = self._client.search_runs([experiment], f"tags.maestro_run = '{run.id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=run.name, tags={"maestro_run": run.id})
        self._id = made.info.run_id
        settings = [Param(_mlflow_name(key)[:250], value[:500]) for key, value in run.settings.items()]
        for begin in range(0, len(settings), 100):  # as many as a request may hold
            self._client.log_batch(self._id, params=settings[begin : begin + 100])

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


class Trackio:
    """Its files are where trackio keeps all of them (TRACKIO_DIR)."""

    def __init__(self, run: TrackedRun):
        import trackio

        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        named = {"project": run.project, "name": run.unique_name, "resume": "allow", "config": dict(run.settings)}
        self._run = trackio.init(**{**named, **quiet, **run.options})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _BuiltIn(NamedTuple):
    made: Callable[[TrackedRun], Tracker]
    module: str
    package: str  # as pip knows it


_BUILT_IN = {
    "tensorboard": _BuiltIn(TensorBoard, "tensorboardX", "tensorboardX"),
    "wandb": _BuiltIn(Wandb, "wandb", "wandb"),
    "mlflow": _BuiltIn(Mlflow, "mlflow", "mlflow-skinny"),
    "trackio": _BuiltIn(Trackio, "trackio", "trackio"),
}


# ---- of a run ----------------------------------------------------------------------------------------------


def check_trackers(config: TrackersConfig) -> None:
    """Raises ConfigError for a tracker that there is none of, or whose package is missing. Imports no built-in one."""
    for name in config.use:
        if ":" in name:
            load(name, "config.trackers.use:")
        elif name not in _BUILT_IN:
            near = difflib.get_close_matches(name, _BUILT_IN, n=1)
            cure = f'did you mean "{near[0]}"?' if near else f'use {", ".join(_BUILT_IN)}, or "package.module:Class"'
            raise ConfigError(f"config.trackers.use has {name!r}, which is no tracker; {cure}")
        elif importlib.util.find_spec(_BUILT_IN[name].module) is None:
            cure = f"install it with `pip install {_BUILT_IN[name].package}`"
            raise ConfigError(f'config.trackers.use has "{name}", whose package is missing; {cure}')
    for name in config.options:
        if name not in map(_short, config.use):
            used = ", ".join(map(_short, config.use)) or "none yet"
            raise ConfigError(f"config.trackers.options.{name} belongs to no tracker in config.trackers.use ({used})")


def _short(name: str) -> str:
    return name.rpartition(":")[2]


class Trackers:
    """All trackers of a run; empty where none is named. What it has to say, it says in the caller's thread.

    Args:
      workdir: its metrics.jsonl says what trackers may lack; None where another process writes it, and tells them.
      settings: of the run, printed, by dotted keys.
      note: hears one line.
    """

    def __init__(
        self,
        config: TrackersConfig,
        workdir: Path | None,
        settings: Mapping[str, str],
        note: Callable[[str], None],
    ):
        self._note = note
        self._feeds: list[_Feed] = []
        if workdir is not None and config.use:
            rows = read_metrics(path) if (path := workdir / "metrics.jsonl").exists() else []
            self._feeds = [_Feed(name, config, workdir, settings, rows) for name in config.use]

    def write(self, row: Mapping[str, Any]) -> None:
        """Hands on a row of metrics, as JSON has it; returns at once."""
        for feed in self._feeds:
            feed.put(row)
        self._tell()

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Returns when trackers have everything, after so many seconds at the latest; none waits for another."""
        deadline = time.monotonic() + seconds
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(deadline)
        self._tell()

    def _tell(self) -> None:
        for feed in self._feeds:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._note(feed.lines.get_nowait())


class _Feed:
    """A tracker behind its queue.

    Attributes:
      lines: what is to be told.
    """

    def __init__(
        self,
        name: str,
        config: TrackersConfig,
        workdir: Path,
        settings: Mapping[str, str],
        rows: Sequence[Mapping[str, Any]],
    ):
        self.lines = queue.SimpleQueue[str]()
        self._name = _short(name)
        self._state = workdir / "trackers" / f"{self._name}.json"
        known = None
        if rows:  # without metrics, a run begins
            try:
                known = read_json(self._state)
            except DataError as error:
                self.lines.put(f"tracker {self._name} gets all steps anew: {one_line(error)}")
        known = known or {"id": uuid.uuid4().hex[:8], "step": -1}
        self._id, self._sent = known["id"], known["step"]
        self._queue = queue.SimpleQueue[Mapping[str, Any] | None]()
        backlog = [row for row in rows if row["step"] > self._sent and not _is_wait(row)]
        self._last = max([self._sent, *(row["step"] for row in backlog)])  # that it was given
        self._lost, self._failed = 0, False
        options = config.options.get(self._name, {})
        directory = Path(config.directory) if config.directory else workdir / "trackers"
        run = TrackedRun(config.project, config.run or workdir.absolute().name, self._id, directory, settings, options)
        arguments = (name, run, backlog)
        self._thread = threading.Thread(target=self._serve, args=arguments, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, row: Mapping[str, Any]) -> None:
        if row["step"] <= self._last or _is_wait(row):
            return
        self._last = row["step"]
        if self._failed or not self._thread.is_alive():
            self._lost += 1
            return
        if self._queue.qsize() < QUEUE:
            self._queue.put(row)
            return
        if not self._lost:
            self.lines.put(f"tracker {self._name} is too slow: {QUEUE} steps wait for it, and further ones go lost")
        self._lost += 1

    def end(self) -> None:
        """Nothing comes after this."""
        self._queue.put(None)

    def join(self, deadline: float) -> None:
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self.lines.put(f"tracker {self._name} does not come to an end; it lacks what came after step {self._sent}")
            return
        with contextlib.suppress(queue.Empty):
            while True:  # what one that never began has not taken
                self._lost += self._queue.get_nowait() is not None
        if self._lost:
            self.lines.put(f"tracker {self._name} lacks {self._lost} steps; metrics.jsonl has all of them")

    def _serve(self, name: str, run: TrackedRun, backlog: Sequence[Mapping[str, Any]]) -> None:
        """The thread: nothing that happens in here may reach the run."""
        tracker = None
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
            self._state.parent.mkdir(parents=True, exist_ok=True)
            tracker = (load(name, "config.trackers.use:") if ":" in name else _BUILT_IN[name].made)(run)
        except BaseException as error:  # a library may raise anything, SystemExit too
            self._failed = True
            self._lost += len(backlog)
            self.lines.put(f"tracker {self._name} cannot be used, the run goes on without it ({one_line(error)})")
            return
        told = False
        for row in itertools.chain(backlog, iter(self._queue.get, None)):
            try:
                tracker.write(row["step"], _numbers(row))
                self._sent = row["step"]
                write_json(self._state, {"id": self._id, "step": self._sent})
            except BaseException as error:
                self._lost += 1
                if not told:
                    self.lines.put(
                        f"tracker {self._name} fails at step {row['step']}, the run goes on ({one_line(error)})"
                    )
                told = True
        try:
            tracker.close()
        except BaseException as error:
            self.lines.put(f"tracker {self._name} fails at the end ({one_line(error)})")


def _is_wait(row: Mapping[str, Any]) -> bool:
    """Whether it stands only as long as the run waits for experts (`training/loop.py`)."""
    return any(name.startswith("waiting/") for name in row)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)}
