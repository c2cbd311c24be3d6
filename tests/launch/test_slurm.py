"""Jobs of launch/slurm on a real Slurm of one node (slurm_cluster.py)."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.golden import REPOSITORY
from tests.launch.slurm_cluster import Slurm, free_ports, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


TRAIN = ("launch/slurm/train.sbatch",)
TWO_PROCESSES = ("--ntasks-per-node=2",)


class Job:
    """A submitted script of launch/slurm with its arguments, and flags of sbatch."""

    def __init__(self, slurm: Slurm, log: Path, script: tuple[str, ...], flags: tuple[str, ...], **settings: str):
        self.slurm, self.log = slurm, log
        submit = ("sbatch", "--parsable", f"--output={log}", f"--chdir={REPOSITORY}", *flags, *script)
        self.number = slurm.run(*submit, **settings).strip()
        assert self.number.isdigit(), self.number

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ends(self) -> list[tuple[str, str]]:
        """Exit code and faults in a row of every run so far, as the script says."""
        return re.findall(r"^[\d:]+ exit code (\d+)(?:, faults in a row: (\d))?$", self.said(), re.MULTILINE)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"{self.slurm.state(self.number)} after {seconds:g} s:\n{self.said()[-4000:]}"
            )
            time.sleep(0.3)

    def wait_for_end(self, seconds: float) -> str:
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        self.wait_until(lambda: self.slurm.state(self.number) in ends, seconds)
        return self.slurm.state(self.number)


def planned(slurm: Slurm, tmp_path: Path, plan: str, *flags: str) -> Job:
    """A job whose processes end as a plan says, one word a restart."""
    (tmp_path / "plan").write_text("".join(f"{word}\n" for word in plan.split()))
    stand_in = str(REPOSITORY / "tests/launch/fakes/python_by_plan.sh")
    script = (*TRAIN, "--config=c", "--workdir=w")
    flags = (*TWO_PROCESSES, *flags)
    return Job(slurm, tmp_path / "log", script, flags, PYTHON=stand_in, PLAN=str(tmp_path / "plan"))


def test_a_job_goes_on_after_preemption_and_faults_until_it_is_done(slurm: Slurm, tmp_path: Path) -> None:
    job = planned(slurm, tmp_path, "70 75 69 70 0")
    assert job.wait_for_end(300) == "COMPLETED", job.said()
    restarts = re.findall(r"process ([01]) of 2, restart (\d): -m maestro_jax.train --config=c --workdir=w", job.said())
    assert sorted(restarts) == sorted((process, str(n)) for process in "01" for n in range(5))
    assert job.ends() == [("70", "1"), ("75", "0"), ("69", "1"), ("70", "2"), ("0", "")]


@pytest.mark.parametrize(
    ("plan", "runs"),
    [("78", 1), ("78/134", 1), ("70 70 70", 3)],
    ids=["a mistake", "a mistake of one that the other aborts for", "three faults in a row"],
)
def test_a_job_ends_where_another_start_would_not_help(slurm: Slurm, tmp_path: Path, plan: str, runs: int) -> None:
    job = planned(slurm, tmp_path, plan)
    assert job.wait_for_end(200) == "FAILED"
    assert job.said().count("process 0 of 2") == runs


def test_the_time_limit_comes_with_a_warning_that_saves(slurm: Slurm, tmp_path: Path) -> None:
    job = planned(slurm, tmp_path, "wait 0", "--time=1", "--signal=TERM@50")
    assert job.wait_for_end(200) == "COMPLETED", job.said()
    assert job.ends() == [("75", "0"), ("0", "")] and "DUE TO TIME LIMIT" not in job.said()


def test_what_slurm_requeues_or_cancels_is_left_to_slurm(slurm: Slurm, tmp_path: Path) -> None:
    job = planned(slurm, tmp_path, "wait wait")
    job.wait_until(lambda: job.said().count("process") == 2, 60)
    slurm.run("scontrol", "requeue", job.number)
    job.wait_until(lambda: job.said().count("process") == 4, 120)
    slurm.run("scancel", job.number)
    assert job.wait_for_end(60) in ("CANCELLED", "FAILED")  # as the script ends before or after Slurm has noted it
    assert job.ends() == [("75", "0"), ("75", "0")]
    assert "restart 2" not in job.said()


# ---- the real command --------------------------------------------------------------------------------------

# One device a process; the flags make toy programs compile faster (tests/conftest.py).
CPU = {"PYTHON": sys.executable, "MAESTRO_CHIP": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
TINY = (
    "--config=configs/quickstart.py",
    "--config.data.train_per_domain=8",
    "--config.data.test_per_domain=2",
    "--config.warm_start.steps=2",
    "--config.grpo.steps=6",
    "--config.grpo.groups=4",
    "--config.grpo.group_size=2",
    "--config.evaluate.batch=10",
    "--config.evaluate.every=6",
    "--config.checkpoint.every=1",
)
MEET = """
from maestro_jax.parallel import cluster
cluster.start()
import jax
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), cluster.gather("here"))
"""


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_processes_of_a_step_find_each_other(slurm: Slurm) -> None:
    found = slurm.run("srun", "--ntasks=2", sys.executable, "-c", MEET, **CPU, JAX_PLATFORMS="cpu")
    assert sorted(found.splitlines()) == ["0 2 1 2 ['here', 'here']", "1 2 1 2 ['here', 'here']"]


def process_of_job(rank: int, workdir: Path) -> int:
    """The number of the training process with this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"--workdir={workdir}" not in (path / "cmdline").read_text().split("\0"):
                continue
            if f"SLURM_PROCID={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
    raise AssertionError(f"no process {rank} in {workdir}")


def test_a_run_that_is_stopped_in_three_ways_is_the_run_that_was_not(slurm: Slurm, tmp_path: Path) -> None:
    """By the signal that announces the time limit, by Slurm, and by the loss of one of two processes."""

    def train(name: str) -> Job:
        script = (*TRAIN, *TINY, f"--workdir={tmp_path / name}")
        return Job(slurm, tmp_path / f"{name}.log", script, TWO_PROCESSES, **CPU)

    def steps(name: str) -> list[int]:
        return [row["step"] for row in lines_of(tmp_path / name / "metrics.jsonl")]

    def resumed(times: int) -> bool:
        return broken.said().count("resumed from the checkpoint of step") == times

    whole = train("whole")
    assert whole.wait_for_end(600) == "COMPLETED", whole.said()[-4000:]

    broken = train("broken")
    broken.wait_until(lambda: 2 in steps("broken"), 600)
    slurm.run("scancel", "--signal=TERM", broken.number)  # to the processes, as --signal does
    broken.wait_until(lambda: resumed(1) and 4 in steps("broken"), 600)
    slurm.run("scontrol", "requeue", broken.number)
    broken.wait_until(lambda: resumed(2), 600)
    os.kill(process_of_job(1, tmp_path / "broken"), signal.SIGKILL)
    assert broken.wait_for_end(600) == "COMPLETED", broken.said()[-4000:]

    assert broken.ends() == [("75", "0"), ("75", "0"), ("137", "1"), ("0", "")]
    assert resumed(3) and steps("broken") == list(range(7))
    for name in ("metrics.jsonl", "trained.jsonl"):
        assert untimed(lines_of(tmp_path / "broken" / name)) == untimed(lines_of(tmp_path / "whole" / name))


# ---- experts -----------------------------------------------------------------------------------------------

EXPERTS = """
from ml_collections import ConfigDict

def get_config():
    serve = ({python!r}, "tests/fleet/toy_server.py", "{{port}}", "mark", "{{host}}")
    expert = {{"name": "A", "description": "d", "model": "m", "serve": serve}}
    expert["endpoints"] = ("http://127.0.0.1:{port}/v1",)
    skill = {{"name": "S", "stages": ({{"kind": "ask", "output": "a", "prompt": "{{question}}"}},)}}
    return ConfigDict({{"registry": {{"experts": (expert,), "services": (), "skills": (skill,)}}}}, convert_dict=True)
"""


def test_experts_say_where_they_are_for_as_long_as_they_are_there(slurm: Slurm, tmp_path: Path) -> None:
    port, published = free_ports(1)[0], tmp_path / "published"
    (tmp_path / "config.py").write_text(EXPERTS.format(python=sys.executable, port=port))
    settings = {"PYTHON": sys.executable, "MAESTRO_EXPERTS": str(published)}
    script = ("launch/slurm/experts.sbatch", f"--config={tmp_path / 'config.py'}")
    job = Job(slurm, tmp_path / "log", script, (), **settings)

    def reached() -> bool:
        path = published / "localhost.json"
        return path.exists() and json.loads(path.read_text()) == {"A": [f"http://localhost:{port}/v1"]}

    job.wait_until(reached, 60)
    slurm.run("scontrol", "requeue", job.number)
    job.wait_until(lambda: not reached(), 60)
    job.wait_until(reached, 60)
    slurm.run("scancel", "--signal=TERM", job.number)  # as near the time limit
    job.wait_until(lambda: not reached(), 60)
    job.wait_until(reached, 60)
    slurm.run("scancel", job.number)
    assert job.wait_for_end(60) in ("CANCELLED", "COMPLETED") and not reached()
