"""Jobs of launch/slurm without Slurm: what they make of its answers (test_slurm.py has a real one)."""

import subprocess

import pytest

from tests.launch.conftest import Cloud

TRAIN = "slurm/train.sbatch --config=c --workdir=w"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b"}


@pytest.fixture
def slurm(cloud: Cloud) -> Cloud:
    """A controller whose job runs and has no comment yet."""
    cloud.program("squeue", 'case "$*" in *%T*) echo RUNNING ;; esac')
    cloud.program("scontrol", 'echo scontrol "$@" >>"$FAKE_CLOUD/calls"')
    return cloud


def ended(slurm: Cloud, code: int, *said: str) -> subprocess.CompletedProcess[str]:
    """The job, whose srun says this and ends with the highest code of its processes."""
    lines = [f"echo '{line}' >&2" for line in said]
    slurm.program("srun", "echo trained", *lines, f"exit {code}")
    return slurm.launch(TRAIN, **JOB)


def test_a_mistake_of_one_process_ends_the_job_though_the_others_abort(slurm: Cloud) -> None:
    mistake = "srun: error: a: task 0: Exited with exit code 78"
    result = ended(slurm, 134, mistake, "srun: error: b: task 1: Aborted (core dumped)")
    assert result.returncode == 78 and not slurm.calls("requeue")
    assert mistake in result.stderr and "Aborted" in result.stderr and result.stdout == "trained\n"


@pytest.mark.parametrize(("code", "said"), [(134, "the other one Exited with exit code 78"), (75, ""), (69, "")])
def test_other_ends_are_requeued(slurm: Cloud, code: int, said: str) -> None:
    result = ended(slurm, code, said)
    assert result.returncode == code and slurm.calls("requeue 7")


def test_done_is_done(slurm: Cloud) -> None:
    assert ended(slurm, 0).returncode == 0 and not slurm.calls("requeue")


def test_training_waits_for_all_nodes_with_experts(slurm: Cloud) -> None:
    """experts.sbatch on two nodes, of which one is slower."""
    published = slurm.directory / "experts"
    slurm.program("srun", f"mkdir -p {published} && touch {published}/a.json")
    settings = {**JOB, "MAESTRO_EXPERTS": str(published)}
    assert slurm.launch("slurm/experts.sbatch --config=c", **settings).returncode == 0
    slurm.program("sleep", f"touch {published}/b.json")  # while training waits
    slurm.program("srun", f"ls {published}")
    assert slurm.launch(TRAIN, **settings).stdout.split() == ["a.json", "b.json", "expected"]
