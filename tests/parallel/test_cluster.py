"""Processes that find each other, talk, and end when one is lost; over gloo on loopback."""

import json
import signal
import time
from pathlib import Path

import pytest

from maestro_jax.errors import EXIT_CONFIG, EXIT_LOST, EXIT_PREEMPTED, ConfigError
from maestro_jax.parallel import cluster
from maestro_jax.parallel.cluster import Cluster, find_cluster, first_host
from tests.parallel import processes

WORKER = "tests.parallel.cluster_worker"
STARTED = 120  # seconds for imports on a busy machine
PROMISE = 15  # seconds in which a lost process ends the others

STEP = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


# ---- what is found -----------------------------------------------------------------------------------------------


def test_a_process_alone_finds_nothing() -> None:
    assert find_cluster({}) is None


def test_a_told_cluster() -> None:
    environ = processes.told("host-0.run:8476", 4, 3) | STEP  # which tells otherwise
    assert find_cluster(environ) == Cluster("MAESTRO_COORDINATOR", "host-0.run:8476", 4, 3)


def test_told_to_be_alone() -> None:
    assert find_cluster({"MAESTRO_PROCESSES": "1"} | STEP) is None


@pytest.mark.parametrize(
    "change",
    [{"MAESTRO_PROCESS": ""}, {"MAESTRO_PROCESS": "2"}, {"MAESTRO_COORDINATOR": "host"}, {"MAESTRO_PROCESSES": "two"}],
)
def test_half_of_what_tells_is_an_error(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="MAESTRO_PROCESS"):
        find_cluster(processes.told("host:8476", 2, 0) | change)


def test_a_slurm_step() -> None:
    assert find_cluster(STEP) == Cluster("Slurm", f"node003:{61440 + 5000 % 4096}", 2, 1)


def test_another_step_of_a_job_has_another_port() -> None:
    first, second = find_cluster(STEP), find_cluster(STEP | {"SLURM_STEP_ID": "1"})
    assert first and second and first.coordinator != second.coordinator


def test_slurm_shells_and_batch_scripts_are_one_process() -> None:
    script = {name: value for name, value in STEP.items() if "STEP" not in name}  # as `sbatch --ntasks=2` sets them
    assert find_cluster(script) is None
    shell = STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}  # of `salloc --ntasks=2`
    assert find_cluster(shell) is None


@pytest.mark.parametrize(
    ("change", "device"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1"}, None),  # a task has the whole node
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"}, None),  # --gpus-per-task=1
    ],
)
def test_gpus_of_slurm_tasks(change: dict[str, str], device: int | None) -> None:
    found = find_cluster(STEP | {"SLURM_LOCALID": "1"} | change)
    assert found is not None and found.device == device


GKE = {"TPU_WORKER_HOSTNAMES": "a.run1,b.run1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "c.run1:8080"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (GKE, ("a.run1:8482", 2, 1)),
        (GKE | SLICES, ("c.run1:8482", 6, 5)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
    ids=["two hosts", "three slices", "one host"],
)
def test_tpu_slices_on_gke_need_no_metadata_server(
    environ: dict[str, str], found: tuple[str, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX's own detection would ask it for what is not set, and pods may not reach it."""
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    assert find_cluster(environ) == (found and Cluster("a TPU slice on GKE", *found))


@pytest.mark.parametrize("missing", ["TPU_WORKER_ID", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS"])
def test_half_of_what_gke_tells_is_an_error(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    environ = {name: value for name, value in (GKE | SLICES).items() if name != missing}
    with pytest.raises(ConfigError, match=f"{missing} is not set"):
        find_cluster(environ)


def test_a_tpu_host_that_computes_on_its_cpu_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "running_in_cloud_tpu_vm", True)
    assert find_cluster({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("x,n[1-2]", "x"), ("n[003-007,12],g1", "n003"), ("n[1,2]-ib", "n1-ib")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# ---- together ----------------------------------------------------------------------------------------------------


def test_values_reach_all_in_the_order_of_processes(tmp_path: Path) -> None:
    with processes.started([WORKER, "talk"], tmp_path) as running:
        assert [one.wait(STARTED) for one in running] == [0, 0]
        said = [json.loads(one.text.splitlines()[-1]) for one in running]
    values = [{"from": n, "text": "é\n", "value": 0.1 + n, "round": 2} for n in range(2)]
    joined = ["a0", "a1", "b0", "c0", "b1", "c1"]
    assert said == [[values, [0, None], joined, True], [values, [0, None], joined, False]]


def test_directories_that_are_not_shared_are_named(tmp_path: Path) -> None:
    with processes.started([WORKER, "share", str(tmp_path)], tmp_path) as running:
        assert running[1].wait(STARTED) == EXIT_CONFIG
        assert f"process 1 does not see what process 0 writes to {tmp_path}/elsewhere" in running[1].text


def test_a_process_that_never_comes(tmp_path: Path) -> None:
    address = processes.free_address()
    alone = processes.Started([WORKER, "meet", "3"], processes.told(address, 2, 0), tmp_path / "0.log")
    assert alone.wait(STARTED) == EXIT_LOST
    assert f"error: 1 of 2 processes came to {address} within 3 s" in alone.text


@pytest.mark.parametrize("doing", ["wait", "add_up"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(doing: str, victim: int, tmp_path: Path) -> None:
    with processes.started([WORKER, doing], tmp_path) as running:
        processes.wait_until(lambda: all("ready" in one.text for one in running), "ready", STARTED)
        running[victim].process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        code = running[1 - victim].wait(60)
        seconds = time.monotonic() - began
    assert code in (EXIT_LOST, -signal.SIGABRT)
    assert seconds < PROMISE


def test_a_process_that_fails_ends_the_other_and_keeps_its_own_code(tmp_path: Path) -> None:
    with processes.started([WORKER, "fail"], tmp_path) as running:
        assert running[0].wait(STARTED) == EXIT_CONFIG
        assert running[1].wait(PROMISE) in (EXIT_LOST, -signal.SIGABRT), running[1].text


def test_what_process_0_refuses_for_all_is_the_users_to_mend_in_all(tmp_path: Path) -> None:
    with processes.started([WORKER, "refuse"], tmp_path) as running:
        codes = [one.wait(STARTED) for one in running]
        texts = [one.text for one in running]
    assert codes == [EXIT_CONFIG] * 2, texts
    assert all("error: row 7 has no grader; correct it" in text for text in texts)


def test_processes_wait_for_an_expert_and_give_up_together(tmp_path: Path) -> None:
    with processes.started([WORKER, "outage"], tmp_path) as running:
        codes = [one.wait(STARTED) for one in running]
        texts = [one.text for one in running]
    assert codes == [EXIT_PREEMPTED] * 2, texts
    for text in texts:  # 2 of 8, met by one of them only
        assert "waiting for Lens (25 %): 25 % of episodes met an outage (away)" in text and "False True" in text
        assert "stopped: waited 0 s (config.rollout.patience) for Lens (100 %): 100 % of calls met an outage" in text
