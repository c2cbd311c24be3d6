"""A run that is killed and stopped wherever it can be, against the same run left alone: nothing may differ at the end.

Every start is a process of its own, ended by SIGKILL or told to stop by SIGTERM, at a named place or at a random time.
The run is the main job at a tiny size, from an empty directory: tokenizer, demonstrations, warm start, baselines,
evaluations, and two epochs of training with calls to experts.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from maestro_jax.errors import EXIT_PREEMPTED
from maestro_jax.observe.files import read_json
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.registry.replay import read_calls
from tests import hanging
from tests.test_train_command import TINY
from tests.zygote import Zygote

TASKS, STEPS, GROUPS = 10, 10, 2  # two epochs: every task is trained twice
EVERY, EVALUATE = 2, 4  # steps between checkpoints, and between evaluations
PROMISE = 5.0  # seconds from SIGTERM to the end at this size
SECONDS = 300  # far above what is needed: a hang fails instead of hanging the suite
RESULTS = ("baselines.json", "before.json", "before_sampled.json", "trained.jsonl")

SETTINGS = TINY | {
    "data.train_per_domain": TASKS // 5,
    "grpo.kl_weight": 0.0,
    "grpo.steps": STEPS,
    "grpo.groups": GROUPS,
    "evaluate.every": EVALUATE,
    "evaluate.batch": 2,  # an evaluation is of several
    "checkpoint.every": EVERY,
}

# Where a run is killed, one start after another. A place is counted from the start of its process.
KILLS = (
    "in_baselines:1",  # in the demonstrations
    "in_warm_start:8",
    "in_evaluation:1",  # before reinforcement
    "after_pull:1",
    "in_rollout:1",
    "after_update:3",
    "after_save:1",
    "in_truncate:1",
    "in_evaluation:1",
    "in_commit:1",
    "after_metrics:3",
    "after_rollout:2",
)
PLACES = tuple(place.partition(":")[0] for place in KILLS[2:])
# The same for SIGTERM; with what the command says that it has saved.
STOPS = (
    ("in_baselines:1", ""),
    ("in_warm_start:15", "step 15 of the warm start is saved"),
    ("in_evaluation:1", ""),
    ("in_rollout:1", "step 0 is saved"),
    ("after_rollout:1", "step 1 is saved"),  # the update is under way
    ("in_evaluation:1", "step 4 is saved"),
    ("after_save:1", "step 6 is saved"),
)


@dataclasses.dataclass(frozen=True)
class Life:
    """One start of a command, from its beginning to its end."""

    code: int
    text: str
    stopping: float  # seconds from the signal to the end

    @property
    def resumed_from(self) -> int:
        """The step of the checkpoint that it went on from; 0 if there was none."""
        found = re.search(r"resumed from the checkpoint of step (\d+)", self.text)
        return int(found[1]) if found else 0

    def assert_stopped(self, saved: str) -> None:
        told = f"stopped by SIGTERM: {saved}; the same" if saved else "stopped by SIGTERM; the same"
        assert self.code == EXIT_PREEMPTED and told in self.text, self.text


class Machine:
    """Starts commands; what they compile is compiled once."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.lives = 0
        self._zygote = Zygote(
            os.environ
            | {
                "JAX_PLATFORMS": "cpu",  # one device, not the eight of the tests
                "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
                "JAX_COMPILATION_CACHE_DIR": str(directory / "programs"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "OPENBLAS_NUM_THREADS": "1",
            }
        )

    def train(self, workdir: Path, failpoint: str = "", config: str = "configs/quickstart.py", **how: Any) -> Life:
        own = ["--config.checkpoint.keep=0", f"--workdir={workdir}"]
        return self.run("maestro_jax.train", [*self.flags(config), *own], failpoint, **how)

    def flags(self, config: str = "configs/quickstart.py") -> list[str]:
        settings = SETTINGS | {"data.suite_directory": self.directory / "suite"}
        return [f"--config={config}", *(f"--config.{key}={value}" for key, value in settings.items())]

    def run(
        self,
        module: str,
        argv: Sequence[str],
        failpoint: str,
        killed_after: float | None = None,
        stopped_at: str = "",
    ) -> Life:
        """Runs a command to its end.

        Args:
          failpoint: of its environment.
          killed_after: seconds until it is killed.
          stopped_at: what it has written when it is told to stop.
        """
        self.lives += 1
        log = self.directory / f"{self.lives}.log"
        process = self._zygote.start(module, argv, {"MAESTRO_FAILPOINT": failpoint}, log)
        if killed_after is not None:
            time.sleep(killed_after)
            os.kill(process, signal.SIGKILL)
        if stopped_at:
            wait_for(stopped_at, log)
            os.kill(process, signal.SIGTERM)
        began = time.monotonic()
        if failpoint.endswith("TERM"):
            began = wait_for("SIGTERM: stopping", log)
        return Life(self._zygote.wait(), log.read_text(errors="replace"), time.monotonic() - began)

    def close(self) -> None:
        self._zygote.close()


def wait_for(text: str, log: Path) -> float:
    """Returns when the log holds the text: the time."""
    end = time.monotonic() + SECONDS
    while text not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < end, f"{text!r} was not written: {log.read_text(errors='replace')}"
        time.sleep(0.01)
    return time.monotonic()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    found = Machine(tmp_path_factory.mktemp("machine"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def unbroken(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    life = machine.train(workdir)
    assert life.code == 0, life.text
    return workdir


def last_update(workdir: Path) -> int:
    path = workdir / "trained.jsonl"
    return max((row["step"] for row in read_metrics(path)), default=0) if path.exists() else 0


def assert_same_run(workdir: Path, unbroken: Path) -> None:
    """Parameters, optimiser, metrics, trajectories and results, to the last bit."""
    for name in RESULTS:
        assert (workdir / name).read_text() == (unbroken / name).read_text(), name
    one, two = (without_times(where / "metrics.jsonl") for where in (workdir, unbroken))
    assert one == two and [row["step"] for row in one] == list(range(STEPS + 1))
    one, two = (arrays(where / "checkpoints") for where in (workdir, unbroken))
    assert one.keys() == two.keys() and any("opt" in name for name in one)
    assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == []
    one, two = (json.loads((where / "summary.json").read_text()) for where in (workdir, unbroken))
    assert one | {"wall_seconds": 0} == two | {"wall_seconds": 0}
    assert calls(workdir) == calls(unbroken)


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in read_metrics(path)]


def arrays(checkpoints: Path) -> dict[str, np.ndarray]:
    """Parameters and optimiser of the last checkpoint, by name."""
    return ocp.PyTreeCheckpointer().restore(checkpoints / f"{STEPS}/state")


def calls(workdir: Path) -> dict[Any, Any]:
    """What was asked in which section by whom, and what came back."""
    return {key: (seen.status, seen.text) for key, seen in read_calls(str(workdir / "journal.jsonl"))}


# ---- killed ------------------------------------------------------------------------------------------------


def killed(machine: Machine, workdir: Path, kills: Sequence[str | float]) -> None:
    """Starts the run again and again, each time ended by a kill at a place or after so many seconds; then lets it end.

    After every kill the next start loses one save interval at most.
    """
    for kill in [*kills, None]:
        done = last_update(workdir) + (str(kill).startswith("after_update"))
        if isinstance(kill, str):
            life = machine.train(workdir, f"{kill}:KILL")
        else:
            life = machine.train(workdir, killed_after=kill)
        assert done - life.resumed_from <= EVERY
        assert life.code == (0 if kill is None else -signal.SIGKILL), f"{kill}: {life.text}"


def test_a_run_killed_at_twelve_places_equals_an_unbroken_one(machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    killed(machine, tmp_path, KILLS)
    assert_same_run(tmp_path, unbroken)


def test_every_task_is_trained_once_an_epoch(unbroken: Path) -> None:
    """And so in every run that equals it."""
    trained = [group["task"] for row in read_metrics(unbroken / "trained.jsonl") for group in row["groups"]]
    epochs = [trained[start : start + TASKS] for start in range(0, len(trained), TASKS)]
    assert len(epochs) == 2 and all(len(set(epoch)) == TASKS for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_comparison_is_not_empty(unbroken: Path) -> None:
    """Experts were called in most steps, and most steps learned something."""
    rows = read_metrics(unbroken / "metrics.jsonl")
    assert sum(row.get("calls", 0) > 0 for row in rows) > STEPS / 2
    assert sum(row.get("grad_norm", 0) > 0 for row in rows) > STEPS / 2


@pytest.mark.slow  # minutes: fifty kills
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_ten_random_times_equals_an_unbroken_one(
    seed: int, machine: Machine, unbroken: Path, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    places = [f"{place}:{rng.randint(1, 2)}" for place in PLACES]
    times = [rng.uniform(0.5, 6.0) for _ in range(20)]
    killed(machine, tmp_path, rng.sample([*places, *times], 10))
    assert_same_run(tmp_path, unbroken)


# ---- stopped -----------------------------------------------------------------------------------------------


def test_a_run_stopped_in_every_phase_equals_an_unbroken_one(machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    for place, saved in STOPS:
        life = machine.train(tmp_path, f"{place}:TERM")
        life.assert_stopped(saved)
        assert life.stopping < PROMISE, life.text
    assert machine.train(tmp_path).code == 0
    assert_same_run(tmp_path, unbroken)


@pytest.fixture
def warm(unbroken: Path, tmp_path: Path) -> Path:
    """A work directory with all that comes before reinforcement, for a run with other settings."""
    later = ("checkpoints", "metrics.jsonl", "trained.jsonl", "summary.json", "*.png", "config.json", "journal.jsonl")
    return Path(shutil.copytree(unbroken, tmp_path / "warm", ignore=shutil.ignore_patterns(*later)))


def test_a_run_is_stopped_while_an_expert_hangs(machine: Machine, warm: Path, tmp_path: Path) -> None:
    config, until = tmp_path / "hanging.py", tmp_path / "go_on"
    config.write_text(hanging.CONFIG.format(until=str(until)))
    life = machine.train(warm, "in_rollout:1:TERM", config=str(config))
    life.assert_stopped("step 0 is saved")
    assert life.stopping < PROMISE, life.text
    until.touch()
    life = machine.train(warm, "after_update:1:TERM", config=str(config))
    assert "resumed from the checkpoint of step 0" in life.text
    life.assert_stopped("step 1 is saved")


def test_a_run_is_stopped_while_it_compiles(machine: Machine, warm: Path) -> None:
    """XLA is not interrupted; the run hears at once, and what it has computed then is saved."""
    own = ["--config.grpo.logprob_chunk=16", f"--workdir={warm}"]  # another program than those that are compiled
    argv = [*machine.flags(), *own]
    life = machine.run("maestro_jax.train", argv, "", stopped_at="new shape of the update")
    life.assert_stopped("step 1 is saved")
    life = machine.run("maestro_jax.train", argv, "after_pull:1:TERM")
    assert life.resumed_from == 1
    life.assert_stopped("step 1 is saved")


def test_an_evaluation_is_stopped_and_goes_on(machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    argv = [*machine.flags(), f"--checkpoint={unbroken}", f"--output={tmp_path}", "--baselines"]
    life = machine.run("maestro_jax.evaluate", argv, "in_baselines:2:TERM")
    life.assert_stopped("")
    assert life.stopping < PROMISE, life.text
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) > 1
    assert machine.run("maestro_jax.evaluate", argv, "").code == 0
    assert read_json(tmp_path / "evaluation.json")["tasks"] == 5
