"""A run that is killed and stopped wherever it can be, against the same run left alone: nothing may differ at the end.

Every start is a process of its own, ended by SIGKILL or told to stop by SIGTERM, at a named place or at a random time.
The run is the main job at a tiny size, from an empty directory: tokenizer, demonstrations, warm start, baselines,
evaluations, and two epochs of training with calls to experts.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from maestro_jax.checkpoint.committed import Committed
from maestro_jax.command import EXIT_SECONDS
from maestro_jax.errors import EXIT_INTERNAL, EXIT_LOST, EXIT_PREEMPTED
from maestro_jax.observe.files import read_json
from maestro_jax.observe.metrics import read_metrics
from maestro_jax.registry.record.replay import read_calls
from tests import hanging
from tests.conftest import QUICK_FLAGS
from tests.main_job import TINY
from tests.parallel import processes
from tests.zygote import SECONDS, Zygote

TASKS, STEPS, GROUPS = 10, 10, 2  # two epochs: every task is trained twice
EVERY, EVALUATE = 2, 4  # steps between checkpoints, and between evaluations
START = 3.0  # seconds, about, from the line about the policy to the first update of a run that goes on
PROMISE = 5.0  # seconds from SIGTERM to the end at this size
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

# How the run is ended, one start after another. A place is counted from the start of its process.
ENDS = (
    "in_warm_start:8:KILL",
    "in_warm_start:14:TERM",
    "in_rollout:1:KILL",
    "after_rollout:1:TERM",  # in the update
    "after_update:2:KILL",
    "in_truncate:1:KILL",
    "in_evaluation:1:KILL",
    "in_commit:1:KILL",
    "in_baselines:2:KILL",  # behind the last update
)
ALL_ENDS = (
    "in_baselines:1:KILL",  # in the demonstrations
    "in_warm_start:8:KILL",
    "in_warm_start:14:TERM",
    "in_evaluation:1:KILL",  # before reinforcement
    "after_pull:1:KILL",
    "in_rollout:1:KILL",
    "after_rollout:1:TERM",  # in the update
    "after_update:2:KILL",
    "before_save:1:KILL",
    "after_pull:1:RAISE",
    "after_save:1:KILL",
    "in_truncate:1:KILL",
    "in_evaluation:1:TERM",
    "in_evaluation:1:KILL",
    "in_commit:1:KILL",
    "after_save:1:INT",
    "after_metrics:1:KILL",
    "after_rollout:1:KILL",
    "in_baselines:2:KILL",  # behind the last update
)
WARM_SAVED = "step 19 of the warm start is saved"  # by TERM: 14 steps after the checkpoint that KILL has left
# Places that every start comes to, until the run is over.
PLACES = ("after_pull", "in_rollout", "after_rollout", "after_update", "after_metrics", "in_truncate")


@dataclasses.dataclass(frozen=True)
class Life:
    """One start of a command, from its beginning to its end.

    Attributes:
      load: how much each core has had to do; what takes time takes so much longer, twice as long at most.
    """

    code: int
    text: str
    load: float = dataclasses.field(
        default_factory=lambda: min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 2.0)
    )

    @property
    def resumed_from(self) -> int:
        """The step of the checkpoint that it went on from; 0 if there was none."""
        found = re.search(r"resumed from the checkpoint of step (\d+)", self.text)
        return int(found[1]) if found else 0

    def saved(self, within: float = PROMISE) -> str:
        """What it says that it has saved, ended as it should after a signal."""
        by = "(?:SIGTERM|SIGINT|a signal to another process)"
        found = re.search(rf"^stopped by {by} in (\d+\.\d) s(.*); the same command goes on$", self.text, re.MULTILINE)
        assert self.code == EXIT_PREEMPTED and found, self.text
        seconds = float(found[1]) + EXIT_SECONDS  # it takes that at most to leave the interpreter
        assert seconds < within * self.load, self.text
        return found[2].removeprefix(": ")


@dataclasses.dataclass(frozen=True)
class Told:
    """A signal to a command that has written `text`, so many seconds later."""

    number: signal.Signals
    text: str = ""
    seconds: float = 0.0


class Machine:
    """Starts commands; what they compile is compiled once."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.lives = 0
        self._environ = os.environ | {
            "JAX_PLATFORMS": "cpu",  # one device, not the eight of the tests
            "XLA_FLAGS": " ".join(QUICK_FLAGS),
            "JAX_COMPILATION_CACHE_DIR": str(directory / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._zygote = Zygote(self._environ)
        self._second: Zygote | None = None

    def train(
        self, workdir: Path, failpoint: str = "", told: Told | None = None, config: str = "configs/quickstart.py"
    ) -> Life:
        own = ["--config.checkpoint.keep=0", f"--workdir={workdir}"]
        return self.run("maestro_jax.train", [*self.flags(config), *own], failpoint, told)

    def flags(self, config: str = "configs/quickstart.py") -> list[str]:
        settings = SETTINGS | {"data.suite_directory": self.directory / "suite"}
        return [f"--config={config}", *(f"--config.{key}={value}" for key, value in settings.items())]

    def train_pair(self, workdir: Path, failpoints: tuple[str, str] = ("", "")) -> list[Life]:
        """The run over two processes, each with one device and a fail-point of its own, to the end of both."""
        self.lives += 1
        argv = [*self.flags(), "--config.checkpoint.keep=0", f"--workdir={workdir}"]
        address = processes.free_address()
        logs = [self.directory / f"{self.lives}.{number}.log" for number in range(2)]
        for number, (zygote, failpoint, log) in enumerate(zip(self._zygotes(), failpoints, logs, strict=True)):
            environ = {"MAESTRO_FAILPOINT": failpoint} | processes.told(address, 2, number)
            zygote.start("maestro_jax.train", argv, environ, log)
        return [Life(z.wait(), log.read_text(errors="replace")) for z, log in zip(self._zygotes(), logs, strict=True)]

    def _zygotes(self) -> list[Zygote]:
        if self._second is None:
            self._second = Zygote(self._environ)
        return [self._zygote, self._second]

    def run(self, module: str, argv: Sequence[str], failpoint: str = "", told: Told | None = None) -> Life:
        """Runs a command to its end, with a fail-point in its environment, or a signal from here."""
        self.lives += 1
        log = self.directory / f"{self.lives}.log"
        process = self._zygote.start(module, argv, {"MAESTRO_FAILPOINT": failpoint}, log)
        if told:
            wait_for(told.text, log)
            time.sleep(told.seconds)
            with contextlib.suppress(ProcessLookupError):  # it is over; its code says so
                os.kill(process, told.number)
        return Life(self._zygote.wait(), log.read_text(errors="replace"))

    def close(self) -> None:
        self._zygote.close()
        if self._second is not None:
            self._second.close()


def wait_for(text: str, log: Path) -> None:
    """Returns when the log holds the text."""
    end = time.monotonic() + SECONDS
    while text not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < end, f"{text!r} was not written: {log.read_text(errors='replace')}"
        time.sleep(0.01)


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


def newest_checkpoint(workdir: Path) -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def assert_same_run(workdir: Path, unbroken: Path, since: str = "") -> None:
    """Parameters, optimiser, metrics, trajectories and results, to the last bit.

    Args:
      since: the section of the journal that calls are compared from; those before are of another work directory.
    """
    for name in RESULTS:
        assert (workdir / name).read_text() == (unbroken / name).read_text(), name
    one, two = (without_times(where / "metrics.jsonl") for where in (workdir, unbroken))
    assert one == two and [row["step"] for row in one] == list(range(STEPS + 1))
    one, two = (arrays(where / "checkpoints") for where in (workdir, unbroken))
    assert one.keys() == two.keys() and any("opt" in name for name in one)
    assert [name for name in one if one[name].tobytes() != two[name].tobytes()] == []
    one, two = (json.loads((where / "summary.json").read_text()) for where in (workdir, unbroken))
    assert one | {"wall_seconds": 0} == two | {"wall_seconds": 0}
    assert calls(workdir) == calls(unbroken, since)


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in read_metrics(path)]


def arrays(checkpoints: Path) -> dict[str, np.ndarray]:
    """Parameters and optimiser of the last checkpoint, by name."""
    found = Committed(epath.Path(checkpoints), STEPS)
    return {name: found.read_array(name) for name in found.leaves}


def calls(workdir: Path, since: str = "") -> dict[Any, Any]:
    """What was asked in which section by whom, and what came back."""
    journals = sorted(workdir.glob("journal*.jsonl"))  # every process has its own
    found = {(path.name, key): (seen.status, seen.text) for path in journals for key, seen in read_calls(str(path))}
    begin = next(i for i, (_, key) in enumerate(found) if since in ("", key.section))
    return dict(list(found.items())[begin:])


# ---- killed and stopped --------------------------------------------------------------------------------------


def ended(machine: Machine, workdir: Path, ends: Iterable[str | Told]) -> list[int]:
    """Starts the run again and again, each time ended at a place or by a signal; then lets it end.

    What was stopped goes on where it was, and a kill costs one save interval at most.

    Returns:
      The last update that had been made at each end.
    """
    updates = []
    for end in itertools.chain(ends, [""]):
        left = newest_checkpoint(workdir)
        assert last_update(workdir) - left <= EVERY
        life = machine.train(workdir, end) if isinstance(end, str) else machine.train(workdir, told=end)
        assert life.resumed_from in (0, left), life.text  # 0: it did not live to say it
        updates.append(last_update(workdir))
        if not end:
            assert life.code == 0, life.text
        elif str(end).endswith((":TERM", ":INT")):
            assert life.saved() in (f"step {updates[-1]} is saved", WARM_SAVED)
        elif str(end).endswith(":RAISE"):
            assert life.code == EXIT_INTERNAL and "FailPointError" in life.text, life.text
        else:
            assert life.code == -signal.SIGKILL, f"{end}: {life.text}"
    return updates[:-1]


@pytest.mark.parametrize("ends", [ENDS, pytest.param(ALL_ENDS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_run_killed_and_stopped_wherever_it_can_be_equals_an_unbroken_one(
    ends: tuple[str, ...], machine: Machine, unbroken: Path, tmp_path: Path
) -> None:
    ended(machine, tmp_path, ends)
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


@pytest.mark.slow
def test_a_run_killed_ten_times_before_it_trains_equals_an_unbroken_one(
    machine: Machine, unbroken: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    ended(machine, tmp_path, [Told(signal.SIGKILL, seconds=rng.uniform(0.5, 8.0)) for _ in range(10)])
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow  # minutes: forty kills
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_ten_times_while_it_trains_equals_an_unbroken_one(
    seed: int, machine: Machine, unbroken: Path, warm: Path
) -> None:
    """By the clock, wherever that hits; and at places, which every start comes to until the run is over."""
    rng = random.Random(seed)
    step = statistics.median(row["seconds"] for row in read_metrics(unbroken / "metrics.jsonl")[1:])

    def ends() -> Iterator[str | Told]:
        for _ in range(10):
            if last_update(warm) < STEPS // 2 and rng.random() < 0.6:
                yield Told(signal.SIGKILL, "\ntrain ", rng.uniform(0.0, 3.5 * step))  # behind its first update
            elif rng.random() < 0.5:
                yield Told(signal.SIGKILL, "policy: ", rng.uniform(0.0, START))
            else:
                yield f"{rng.choice(PLACES)}:1:KILL"

    updates = ended(machine, warm, ends())
    assert updates[-1] > EVERY, f"killed too early to prove anything: {updates}"
    assert_same_run(warm, unbroken, since="step 1")


@pytest.fixture
def warm(unbroken: Path, tmp_path: Path) -> Path:
    """A work directory with all that comes before reinforcement, for a run with other settings."""
    later = ("checkpoints", "metrics.jsonl", "trained.jsonl", "summary.json", "*.png", "config.json", "journal.jsonl")
    return Path(shutil.copytree(unbroken, tmp_path / "warm", ignore=shutil.ignore_patterns(*later)))


def test_a_run_is_stopped_while_an_expert_hangs(machine: Machine, warm: Path, tmp_path: Path) -> None:
    config, until = tmp_path / "hanging.py", tmp_path / "go_on"
    config.write_text(hanging.CONFIG.format(until=str(until)))
    life = machine.train(warm, "in_rollout:1:TERM", config=str(config))
    assert life.saved() == "step 0 is saved"
    until.touch()
    life = machine.train(warm, "after_update:1:TERM", config=str(config))
    assert "resumed from the checkpoint of step 0" in life.text
    assert life.saved() == "step 1 is saved"


@pytest.mark.slow  # to be compiled
def test_a_run_is_stopped_while_it_compiles(machine: Machine, warm: Path) -> None:
    """XLA is not interrupted; the run hears at once, and what it has computed then is saved."""
    own = ["--config.grpo.logprob_chunk=16", f"--workdir={warm}"]  # another program than those that are compiled
    argv = [*machine.flags(), *own]
    life = machine.run("maestro_jax.train", argv, told=Told(signal.SIGTERM, "new shape of the update"))
    assert life.saved(SECONDS) == "step 1 is saved"
    life = machine.run("maestro_jax.train", argv, "after_pull:1:TERM")
    assert life.resumed_from == 1
    assert life.saved() == "step 1 is saved"


@pytest.mark.slow
def test_an_evaluation_is_stopped_and_goes_on(machine: Machine, unbroken: Path, tmp_path: Path) -> None:
    argv = [*machine.flags(), f"--checkpoint={unbroken}", f"--output={tmp_path}", "--baselines"]
    life = machine.run("maestro_jax.evaluate", argv, "in_baselines:2:TERM")
    assert life.saved() == ""
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) > 1
    assert machine.run("maestro_jax.evaluate", argv).code == 0
    assert read_json(tmp_path / "evaluation.json")["tasks"] == 5


# ---- one's own demonstrations, and groups that are replaced --------------------------------------------------

OWN_STEPS = 5
OWN_ENDS = (
    "in_warm_start:8:KILL",
    "in_warm_start:14:TERM",
    "after_pull:2:KILL",
    "after_update:1:KILL",
    "in_rollout:3:KILL",
    "after_rollout:2:TERM",
    "after_pull:3:KILL",
    "after_save:1:KILL",
)


@pytest.mark.slow  # minutes: ten starts
def test_own_demonstrations_and_replaced_groups_survive_kills(machine: Machine, tmp_path: Path) -> None:
    """Groups without contrast are replaced out of what a step leaves of a batch, so most steps end in the middle."""
    shown = tmp_path / "own.jsonl"
    call = "<search> Tally@@Counting_Problem_Solver: count them </search>"
    said = [[f"How many {name}?", call, str(n), f"<answer> {n} </answer>"] for n, name in enumerate("abcdef")]
    roles = ("user", "assistant", "tool", "assistant")
    rows = ({"messages": [{"role": r, "content": x} for r, x in zip(roles, one, strict=True)]} for one in said)
    shown.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        "warm_start.demonstrations": f"('{shown}',)",
        "grpo.refill": 2,
        "grpo.steps": OWN_STEPS,
        "checkpoint.every": 1,
        "evaluate.every": OWN_STEPS,
        "evaluate.baselines": False,
        "reward.cost_weight": 0.0,
    }

    def train(name: str, failpoint: str = "") -> Life:
        own = [f"--config.{key}={value}" for key, value in settings.items()]
        return machine.run("maestro_jax.train", [*machine.flags(), *own, f"--workdir={tmp_path / name}"], failpoint)

    assert (life := train("unbroken")).code == 0, life.text
    for end in OWN_ENDS:
        life = train("broken", end)
        assert life.code == (EXIT_PREEMPTED if end.endswith("TERM") else -signal.SIGKILL), f"{end}: {life.text}"
    assert (life := train("broken")).code == 0, life.text

    one, two = tmp_path / "broken", tmp_path / "unbroken"
    assert (one / "trained.jsonl").read_text() == (two / "trained.jsonl").read_text()
    assert without_times(one / "metrics.jsonl") == without_times(two / "metrics.jsonl")
    for name, step in (("warm_start", TINY["warm_start.steps"]), ("checkpoints", OWN_STEPS)):
        found, wanted = (Committed(epath.Path(where / name), step) for where in (one, two))
        assert found.leaves.keys() == wanted.leaves.keys()
        for leaf in found.leaves:
            assert found.read_array(leaf).tobytes() == wanted.read_array(leaf).tobytes(), leaf
    assert calls(one) == calls(two)

    measured = {row["step"]: row for row in read_metrics(two / "metrics.jsonl")}
    taken = collections.Counter[str]()
    for row in read_metrics(two / "trained.jsonl"):
        new = [group["task"] for group in (*row["groups"], *row["replaced"])]
        assert len(row["groups"]) == GROUPS and len(new) == measured[row["step"]]["tasks"] <= 3 * GROUPS
        assert all(len(set(group["rewards"])) == 1 for group in row["replaced"])
        taken.update(new)
        counts = [taken[task] for task in taken]  # whoever is behind has not been taken at all
        assert max(counts) - (min(counts) if len(counts) == TASKS else 0) <= 1
    assert sum(measured[step]["refilled"] for step in range(1, OWN_STEPS + 1)) > 0


# ---- numbers that are not finite ------------------------------------------------------------------------------


@pytest.mark.slow  # four starts
def test_updates_that_are_not_finite_are_skipped_and_stop_a_run_that_has_no_others(
    machine: Machine, tmp_path: Path
) -> None:
    """Every step has a checkpoint: after a skipped update it is that of the step before, to the last bit."""
    settings = {"checkpoint.every": 1, "evaluate.every": STEPS, "evaluate.baselines": False, "warm_start.steps": 10}

    def train(name: str, failpoint: str = "") -> Life:
        own = [f"--config.{key}={value}" for key, value in settings.items()]
        own += ["--config.checkpoint.keep=0", f"--workdir={tmp_path / name}"]
        return machine.run("maestro_jax.train", [*machine.flags(), *own], failpoint)

    def state(name: str, step: int) -> dict[str, np.ndarray]:
        found = Committed(epath.Path(tmp_path / name / "checkpoints"), step)
        return {leaf: found.read_array(leaf) for leaf in found.leaves}

    def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
        return one.keys() == two.keys() and all(one[leaf].tobytes() == two[leaf].tobytes() for leaf in one)

    assert (life := train("once", "before_update:5:NAN")).code == 0, life.text
    rows = read_metrics(tmp_path / "once/metrics.jsonl")
    assert [row["step"] for row in rows if row.get("skipped")] == [5] and rows[-1]["step"] == STEPS
    assert json.loads((tmp_path / "once/summary.json").read_text())["skipped_updates"] == 1
    assert (
        f"1 of {STEPS} updates were skipped" in life.text and "the update of step 5 is skipped: loss nan" in life.text
    )
    (told,) = [row["skipped"] for row in read_metrics(tmp_path / "once/trained.jsonl") if "skipped" in row]
    assert told["tasks"]["count"] and told["tensors"]["count"] > len(told["tensors"]["first"])
    assert same(state("once", 5), state("once", 4)) and not same(state("once", 4), state("once", 3))
    assert all(np.isfinite(leaf).all() for leaf in state("once", STEPS).values())

    life = train("thrice", "before_update:5:NAN,before_update:6:NAN,before_update:7:NAN")
    assert life.code == EXIT_INTERNAL and "Traceback" not in life.text, life.text
    assert "error: 3 updates in a row were skipped, up to step 7: " in life.text
    assert newest_checkpoint(tmp_path / "thrice") == 6 and same(state("thrice", 6), state("once", 4))
    assert read_metrics(tmp_path / "thrice/metrics.jsonl")[-1]["skipped"] == 1.0
    # It counts the two before its checkpoint.
    life = train("thrice", "before_update:1:NAN")
    assert life.code == EXIT_INTERNAL and life.resumed_from == 6, life.text
    assert (life := train("thrice")).code == 0, life.text
    assert json.loads((tmp_path / "thrice/summary.json").read_text())["skipped_updates"] == 2


# ---- two processes -----------------------------------------------------------------------------------------

# How each of the two is ended; the other has to notice.
PAIR_ENDS = (
    ("", "in_warm_start:5:TERM"),
    ("in_baselines:1:KILL", ""),
    ("", "in_rollout:1:KILL"),
    ("", "in_rollout:1:TERM"),
    ("after_update:2:KILL", ""),
    ("in_commit:1:KILL", ""),
    ("in_evaluation:1:TERM", ""),
    ("", "after_rollout:1:KILL"),
)
LOST = (EXIT_LOST, -signal.SIGABRT)


@pytest.mark.slow  # minutes: ten starts of two processes
def test_two_processes_killed_and_stopped_equal_unbroken_ones(machine: Machine, tmp_path: Path) -> None:
    """Who loses the other ends as well; where one is told to stop, both do, with one checkpoint."""
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "broken"
    assert [life.code for life in machine.train_pair(unbroken)] == [0, 0]
    for ends in PAIR_ENDS:
        lives = machine.train_pair(workdir, ends)
        codes = [life.code for life in lives]
        if any(end.endswith("TERM") for end in ends):
            assert codes == [EXIT_PREEMPTED] * 2, lives
            assert lives[0].saved(SECONDS) == lives[1].saved(SECONDS)
        else:
            killed = 0 if ends[0] else 1
            assert codes[killed] == -signal.SIGKILL and codes[1 - killed] in LOST, lives
    assert [life.code for life in machine.train_pair(workdir)] == [0, 0]
    assert_same_run(workdir, unbroken)
