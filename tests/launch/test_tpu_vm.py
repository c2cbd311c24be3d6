"""TPU VMs: created once, despite shortages; deleted only when told."""

import shutil
import sys
from pathlib import Path

from tests.launch.conftest import REPOSITORY, Cloud

WHERE = "--name=run1 --zone=us-west4-a"
CREATE = f"tpu_vm/create.sh {WHERE} --accelerator=v5litepod-64 --config=configs/qwen3_vl_4b.py"
SHORTAGE = 'code 8: There is no more capacity in the zone "us-west4-a"; you can try in another zone'


def test_what_is_missing_is_named_with_its_cure(cloud: Cloud) -> None:
    result = cloud.launch("tpu_vm/create.sh --name=run1 --accelerator=v5litepod-64")
    assert result.returncode == 78
    assert "--zone=... or MAESTRO_ZONE" in result.stderr and "--config=... or MAESTRO_CONFIG" in result.stderr
    assert "MAESTRO_NAME" not in result.stderr
    assert not cloud.calls()


def test_an_unknown_flag_is_refused(cloud: Cloud) -> None:
    result = cloud.launch(f"{CREATE} --spott")
    assert result.returncode == 78 and "--spott" in result.stderr
    assert not cloud.calls()


def test_settings_may_come_from_the_environment(cloud: Cloud) -> None:
    command = "tpu_vm/create.sh --accelerator=v6e-16 --config=configs/qwen3_vl_4b.py"
    result = cloud.launch(command, MAESTRO_NAME="run2", MAESTRO_ZONE="europe-west4-a", MAESTRO_SPOT="1")
    assert result.returncode == 0
    (created,) = cloud.calls("create")
    assert "create run2 --zone=europe-west4-a" in created and created.endswith("--version=v2-alpha-tpuv6e --spot")


def test_create_waits_for_capacity(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-create", SHORTAGE, SHORTAGE)
    result = cloud.launch(CREATE)
    assert result.returncode == 0
    assert len(cloud.calls("create")) == 3
    assert "attempt 2 of 30 failed" in result.stderr


def test_create_gives_up_with_try_again(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-create", SHORTAGE, SHORTAGE)
    result = cloud.launch(f"{CREATE} --attempts=2")
    assert result.returncode == 75 and "launch/tpu_queued/create.sh" in result.stderr


def test_a_quota_is_not_tried_again(cloud: Cloud) -> None:
    cloud.lines(
        "failures/compute-tpus-tpu-vm-create", "Quota limit 'TPUV5sPreemptibleLitepodPerProject' has been exceeded"
    )
    result = cloud.launch(CREATE)
    assert result.returncode == 70 and "TPUV5sPreemptible" in result.stderr
    assert len(cloud.calls("create")) == 1


def test_create_goes_on_where_there_is_one(cloud: Cloud) -> None:
    assert cloud.launch(CREATE).returncode == 0
    result = cloud.launch(CREATE)
    assert result.returncode == 0 and "exists" in result.stderr
    assert len(cloud.calls("create")) == 1


def test_create_does_not_delete_a_preempted_one(cloud: Cloud) -> None:
    cloud.launch(CREATE)
    cloud.lines("tpu-vm/run1", "PREEMPTED")
    result = cloud.launch(CREATE)
    assert result.returncode == 75 and "delete.sh" in result.stderr
    assert not cloud.calls("delete")


def test_no_answer_is_no_leave_to_create(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-describe", "PERMISSION_DENIED: tpu.nodes.get")
    result = cloud.launch(CREATE)
    assert result.returncode == 70 and "PERMISSION_DENIED" in result.stderr
    assert not cloud.calls("create")


def test_no_gcloud_is_no_missing_machine(cloud: Cloud) -> None:
    cloud.program("gcloud", "echo gcloud: not found >&2", "exit 127")  # as a shell ends without one
    result = cloud.launch(f"tpu_vm/delete.sh {WHERE}")
    assert result.returncode == 78 and "gcloud is not installed" in result.stderr


def test_a_mesh_that_does_not_fit_creates_nothing(cloud: Cloud) -> None:
    result = cloud.launch(f"{CREATE} -- --config.grpo.groups=63", PYTHON=sys.executable)
    assert result.returncode == 78 and "set it to a multiple of 64" in result.stderr
    assert not cloud.calls()


def test_an_unchecked_mesh_is_warned_of(cloud: Cloud) -> None:
    assert "mesh and slice are not compared" in cloud.launch(CREATE).stderr


def test_a_python_below_the_directory_it_is_named_from(cloud: Cloud, tmp_path: Path) -> None:
    cloud.program("python", 'case "$*" in *slice_check*) exit 1 ;; esac')
    here = f"cd {tmp_path} && {REPOSITORY}/launch/{CREATE}"
    result = cloud.run(here, PYTHON="bin/python")
    assert result.returncode == 78 and "nothing was created" in result.stderr


def test_a_config_that_is_not_committed_creates_nothing(cloud: Cloud) -> None:
    result = cloud.launch(f"{CREATE} --config=configs/forgotten.py:large")
    assert result.returncode == 78 and "configs/forgotten.py is not in the last commit" in result.stderr
    assert not cloud.calls()


def test_what_is_not_committed_is_warned_of(cloud: Cloud, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "launch", copy / "launch")
    setup = f"cd {copy} && launch/tpu_vm/setup.sh {WHERE} --config=config.py"
    result = cloud.run(setup)
    assert result.returncode == 78 and "has no commit" in result.stderr
    (copy / "config.py").touch()
    git = "git -c user.name=a -c user.email=a@localhost"
    assert cloud.run(f"cd {copy} && git init -q && git add -A && {git} commit -qm a && {setup}").returncode == 0
    (copy / "config.py").write_text("changed")
    result = cloud.run(setup)
    assert result.returncode == 0 and "what is not committed does not run:\n M config.py" in result.stderr


def test_the_start_waits_for_workers(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-ssh", "ssh: connect to host 10.1.2.3 port 22: Connection refused")
    result = cloud.launch(f"tpu_vm/run.sh {WHERE} --config=configs/qwen3_vl_4b.py --workdir=/mnt/maestro/run1")
    assert result.returncode == 0 and len(cloud.calls("worker.sh start")) == 2


def test_setup_waits_for_workers(cloud: Cloud) -> None:
    cloud.lines("failures/compute-tpus-tpu-vm-scp", "ssh: connect to host 10.1.2.3 port 22: Connection refused")
    result = cloud.launch(f"tpu_vm/setup.sh {WHERE} --share=10.0.0.2:/maestro")
    assert result.returncode == 0
    assert len(cloud.calls("scp")) == 2
    (setup,) = cloud.calls("ssh")
    assert "worker.sh setup 10.0.0.2:/maestro" in setup


def test_status_says_what_says_most(cloud: Cloud) -> None:
    for said, expected in (
        ("idle idle", "idle"),
        ("0 0", "0"),
        ("75 75", "75"),
        ("75 running", "running"),
        ("75 78", "78"),
        ("75 134", "134"),
    ):
        cloud.lines("workers", said)
        assert cloud.launch(f"tpu_vm/status.sh {WHERE}").stdout.strip() == expected
    cloud.lines("failures/compute-tpus-tpu-vm-ssh", "Connection timed out")
    assert cloud.launch(f"tpu_vm/status.sh {WHERE}").stdout.strip() == "unreachable"


def test_delete_lets_the_run_save_first(cloud: Cloud) -> None:
    cloud.launch(CREATE)
    result = cloud.launch(f"tpu_vm/delete.sh {WHERE}")
    assert result.returncode == 0
    stop, delete = cloud.calls()[-2:]
    assert "worker.sh stop" in stop and "tpu-vm delete run1" in delete
    assert "nothing to delete" in cloud.launch(f"tpu_vm/delete.sh {WHERE}").stderr
