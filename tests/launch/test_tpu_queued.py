"""The loop around TPUs that may be taken away: what it does on each state and on each exit code of the run."""

import subprocess

from tests.launch.conftest import Cloud

WHERE = "--name=run1 --zone=us-west4-a"
ASK = f"{WHERE} --accelerator=v5litepod-64 --spot --config=configs/qwen3_vl_4b.py"
LOOP = f"tpu_queued/loop.sh {ASK} --workdir=/mnt/maestro/run1 --share=10.0.0.2:/maestro"


def loop(
    cloud: Cloud, workers: list[str], queue: tuple[str, ...] = ("ACTIVE",), flags: str = ""
) -> subprocess.CompletedProcess[str]:
    """The loop, where workers say one thing after the other and requests go through these states."""
    cloud.lines("workers", *workers)
    cloud.lines("queue", *queue)
    return cloud.launch(f"{LOOP} {flags} -- --config.grpo.steps=7")


def test_a_run_from_nothing_to_done(cloud: Cloud) -> None:
    result = loop(cloud, ["idle", "running", "0"], ("WAITING_FOR_RESOURCES PROVISIONING ACTIVE",))
    assert result.returncode == 0
    (started,) = cloud.calls("worker.sh start")
    assert "--workdir=/mnt/maestro/run1 --config.grpo.steps=7" in started
    assert "request: WAITING_FOR_RESOURCES" in result.stderr and "the run is done" in result.stderr
    assert not cloud.calls("delete")  # nobody said so


def test_done_and_told_so_it_deletes(cloud: Cloud) -> None:
    assert loop(cloud, ["idle", "0"], flags="--delete-when-done").returncode == 0
    assert cloud.calls("queued-resources delete run1", "--force")


def test_taken_away_is_asked_for_again(cloud: Cloud) -> None:
    result = loop(
        cloud, ["idle", "running", "idle", "0"], ("ACTIVE ACTIVE ACTIVE SUSPENDING SUSPENDED", "PROVISIONING ACTIVE")
    )
    assert result.returncode == 0
    assert len(cloud.calls("queued-resources create")) == 2
    assert len(cloud.calls("queued-resources delete")) == 1
    assert len(cloud.calls("worker.sh setup")) == 2 and len(cloud.calls("worker.sh start")) == 2


def test_preempted_and_saved_goes_on(cloud: Cloud) -> None:
    assert loop(cloud, ["idle", "75 75", "75 75", "75 75", "75 75", "0 0"]).returncode == 0
    assert len(cloud.calls("worker.sh start")) == 5  # more often than faults are allowed: this is none


def test_a_configuration_error_ends_it(cloud: Cloud) -> None:
    result = loop(cloud, ["idle", "78 75"])
    assert result.returncode == 78
    assert len(cloud.calls("worker.sh start")) == 1


def test_after_a_correction_the_same_command_goes_on(cloud: Cloud) -> None:
    assert loop(cloud, ["idle", "78"]).returncode == 78
    assert loop(cloud, ["78", "running", "0"]).returncode == 0
    assert len(cloud.calls("worker.sh start")) == 2


def test_faults_in_a_row_end_it(cloud: Cloud) -> None:
    result = loop(cloud, ["idle", "70", "75", "70", "134 75", "70"])
    assert result.returncode == 70 and "3 faults in a row" in result.stderr
    assert len(cloud.calls("worker.sh start")) == 5


def test_a_shortage_of_requests_and_silence_are_waited_out(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-queued-resources-create", "Insufficient capacity", "Insufficient capacity")
    cloud.lines("failures/compute-tpus-tpu-vm-ssh", "Connection reset by peer", "Connection reset by peer")
    result = loop(cloud, ["idle", "0"])
    assert result.returncode == 0
    assert "the workers do not answer" in result.stderr


def test_gcloud_failing_in_between_does_not_end_it(cloud: Cloud) -> None:
    cloud.launch(f"tpu_queued/create.sh {ASK}")
    cloud.lines("failures/compute-tpus-queued-resources-describe", "", "UNAVAILABLE: try later")
    cloud.lines("workers", "running", "0")
    result = cloud.launch(LOOP)
    assert result.returncode == 0 and "request: unknown" in result.stderr


def test_gcloud_failing_at_once_ends_it(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-queued-resources-describe", "PERMISSION_DENIED: tpu.queuedResources.get")
    assert cloud.launch(LOOP).returncode == 70
    assert not cloud.calls("create")


def test_tpus_that_are_gone_before_the_request_says_so(cloud: Cloud) -> None:
    (cloud.directory / "tpu-vm").mkdir()
    cloud.lines("tpu-vm/run1", "READY", "PREEMPTED")
    cloud.lines("failures/compute-tpus-tpu-vm-ssh", "Connection timed out", "Connection timed out")
    result = loop(cloud, ["idle", "0"])
    assert result.returncode == 0
    assert "do not answer; the TPUs are READY" in result.stderr and "the TPUs are PREEMPTED" in result.stderr
    assert len(cloud.calls("queued-resources create")) == 2


def test_a_request_that_fails_is_not_repeated_forever(cloud: Cloud) -> None:
    result = loop(cloud, ["idle"], ("FAILED", "FAILED", "FAILED"))
    assert result.returncode == 70 and "the request failed" in result.stderr
    assert len(cloud.calls("queued-resources create")) == 3


def test_a_request_that_is_refused_is_not_repeated_forever(cloud: Cloud) -> None:
    refused = "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"
    cloud.lines("failures/compute-tpus-queued-resources-create", refused, refused, refused)
    result = loop(cloud, ["idle", "0"])
    assert result.returncode == 70 and "create.sh ended with 70; fault 3 of 3" in result.stderr
    assert "cost money" not in result.stderr  # there are no TPUs


def test_a_setup_that_fails_starts_nothing_and_is_a_fault(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-scp", *["maestro.tar.gz: No space left on device"] * 3)
    result = loop(cloud, ["idle"])
    assert result.returncode == 70 and "setup.sh ended with 70; fault 3 of 3" in result.stderr
    assert "launch/tpu_queued/delete.sh --name=run1 --zone=us-west4-a deletes them" in result.stderr
    assert not cloud.calls("worker.sh start")


def test_a_setup_that_fails_after_a_preemption_is_not_repeated_forever(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-scp", "", *["maestro.tar.gz: No space left on device"] * 3)
    result = loop(cloud, ["idle", "75", "75", "75", "0"])  # how the last run ended, as long as none is started
    assert result.returncode == 70 and "setup.sh ended with 70; fault 3 of 3" in result.stderr


def test_a_worker_that_is_not_set_up_is_set_up_before_the_start(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-ssh", "", "E: Unable to locate package")  # status, then setup
    assert loop(cloud, ["idle", "idle", "0"]).returncode == 0
    assert len(cloud.calls("worker.sh setup")) == 2 and len(cloud.calls("worker.sh start")) == 1


def test_a_setup_whose_tpus_are_taken_away_is_no_fault(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-scp", *["is not in state READY"] * 3)
    result = loop(cloud, ["idle", "idle", "idle", "idle", "0"], ("ACTIVE SUSPENDED",) * 3 + ("ACTIVE",))
    assert result.returncode == 0 and "setup.sh ended with 70 as the TPUs went away" in result.stderr


def test_it_may_be_interrupted_and_started_again(cloud: Cloud) -> None:
    cloud.launch(f"tpu_queued/create.sh {ASK}")
    cloud.lines("workers", "running", "0")
    assert cloud.launch(LOOP).returncode == 0
    assert len(cloud.calls("queued-resources create")) == 1 and not cloud.calls("worker.sh start")


def test_create_goes_on_where_there_is_a_request(cloud: Cloud) -> None:
    cloud.lines("queue", "WAITING_FOR_RESOURCES")
    cloud.launch(f"tpu_queued/create.sh {ASK}")
    result = cloud.launch(f"tpu_queued/create.sh {ASK}")
    assert result.returncode == 0 and "exists: WAITING_FOR_RESOURCES" in result.stderr


def test_create_does_not_delete_a_suspended_request(cloud: Cloud) -> None:
    cloud.lines("queue", "SUSPENDED")
    cloud.launch(f"tpu_queued/create.sh {ASK}")
    result = cloud.launch(f"tpu_queued/create.sh {ASK}")
    assert result.returncode == 75 and not cloud.calls("delete")
