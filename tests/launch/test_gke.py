"""Runs on GKE: a cluster is made once, a run is submitted once, neither is deleted by itself."""

import re

import pytest
import yaml

from maestro_jax.aot import slices
from maestro_jax.aot.slices import parse_accelerator
from tests.launch.conftest import Cloud
from tests.launch.golden import REPOSITORY

CLUSTER = (
    "gke/cluster.sh --cluster=maestro --location=us-west4 --node-zone=us-west4-a --accelerator=v5litepod-64 "
    "--config=configs/qwen3_vl_4b.py --experts=2"
)
SUBMIT = (
    "gke/submit.sh --name=run1 --image=registry/maestro:1 --accelerator=v5litepod-64 --config=configs/qwen3_vl_4b.py"
)


def test_a_cluster_is_made_once(cloud: Cloud) -> None:
    assert cloud.launch(CLUSTER).returncode == 0
    assert len(cloud.calls("create")) == 3
    result = cloud.launch(CLUSTER)
    assert result.returncode == 0 and "node pool experts-v5litepod-64 exists" in result.stderr
    assert len(cloud.calls("create")) == 3


def made(cloud: Cloud, flags: str) -> dict[tuple[str, str], dict]:
    """What cluster.sh applies, by kind and name."""
    assert cloud.launch(f"{CLUSTER.removesuffix(' --experts=2')} {flags}").returncode == 0
    applied = yaml.safe_load_all((cloud.directory / "applied").read_text())
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in applied}


def test_another_accelerator_or_namespace_changes_no_queue_of_the_first(cloud: Cloud) -> None:
    first = made(cloud, "--experts=2")
    second = made(cloud, "--accelerator=v6e-16 --experts=1")
    third = made(cloud, "--namespace=others --experts=2")
    queues = {key for key in first if key[0] in ("ClusterQueue", "LocalQueue")}
    assert len(queues) == 2 and not queues & second.keys()
    for key in first.keys() & second.keys():
        assert second[key] == first[key]
    assert third["ClusterQueue", "v5litepod-64"] == first["ClusterQueue", "v5litepod-64"]
    assert third["LocalQueue", "v5litepod-64"]["metadata"]["namespace"] == "others"


def test_without_experts_those_that_a_queue_has_stay(cloud: Cloud) -> None:
    assert ("ClusterQueue", "v5litepod-64") in made(cloud, "--experts=2")
    again = made(cloud, "")
    assert ("ClusterQueue", "v5litepod-64") not in again and ("LocalQueue", "v5litepod-64") in again
    assert ("ClusterQueue", "v6e-16") in made(cloud, "--accelerator=v6e-16")


def test_logs_are_those_of_the_newest_pod(cloud: Cloud) -> None:
    cloud.lines("pods", "run1-trainer-0-0-old", "run1-trainer-0-0-new")
    assert cloud.launch("gke/logs.sh --name=run1 --follow").returncode == 0
    (call,) = cloud.calls("logs")
    assert "pod/run1-trainer-0-0-new" in call and call.endswith("--follow")
    cloud.lines("pods")
    result = cloud.launch("gke/logs.sh --name=run1 --host=3")
    assert result.returncode == 75 and "no pod of host 3" in result.stderr


def test_a_shortage_is_waited_out_and_what_was_made_stays(cloud: Cloud) -> None:
    shortage = "GCE_STOCKOUT: the zone does not have enough resources"
    cloud.lines("failures/container-node-pools-create", shortage, shortage, shortage)
    result = cloud.launch(f"{CLUSTER} --attempts=2")
    assert result.returncode == 75 and "--node-zone" in result.stderr
    assert cloud.launch(CLUSTER).returncode == 0
    assert len(cloud.calls("clusters create")) == 1 and len(cloud.calls("node-pools create")) == 5
    assert not cloud.calls("delete")


def test_a_run_is_submitted_once(cloud: Cloud) -> None:
    assert cloud.launch(SUBMIT).returncode == 0
    result = cloud.launch(SUBMIT)
    assert result.returncode == 0 and "exists" in result.stderr
    assert len(cloud.calls("apply")) == 1


def test_a_failed_run_is_not_deleted_by_itself(cloud: Cloud) -> None:
    cloud.launch(SUBMIT)
    cloud.lines("jobset/run1", "Failed")
    result = cloud.launch(SUBMIT)
    assert result.returncode == 75 and "delete.sh" in result.stderr
    assert cloud.launch("gke/delete.sh --name=run1").returncode == 0
    assert cloud.launch(SUBMIT).returncode == 0
    assert len(cloud.calls("apply")) == 2


def test_no_answer_of_the_cluster_is_no_leave_to_submit(cloud: Cloud) -> None:
    cloud.lines("failures/kubectl-get", "connection to the server was refused")
    result = cloud.launch(SUBMIT)
    assert result.returncode == 70 and "was refused" in result.stderr
    assert not cloud.calls("apply")


def test_urls_of_experts_are_said(cloud: Cloud) -> None:
    result = cloud.launch(f"{SUBMIT} --experts=chart=DocTron/Chart-R1 --expert-image=registry/experts:1")
    assert "expert DocTron/Chart-R1: http://run1-chart-0-0.run1:8000/v1" in result.stderr
    assert "name: chart" in (cloud.directory / "applied").read_text()


def test_the_trainer_waits_for_any_number_of_experts(cloud: Cloud) -> None:
    """JobSet lets a job name five others; so experts wait for each other in five lines."""
    names = [f"e{number}" for number in range(1, 13)]
    experts = ",".join(f"{name}=m" for name in names)
    cloud.launch(f"{SUBMIT} --experts={experts} --expert-image=i")
    (jobset,) = yaml.safe_load_all((cloud.directory / "applied").read_text())
    waits = {
        job["name"]: [other["name"] for other in job.get("dependsOn", [])] for job in jobset["spec"]["replicatedJobs"]
    }
    assert list(waits) == [*names, "trainer"] and max(map(len, waits.values())) == 5
    reached, todo = set(), ["trainer"]
    while todo:
        behind = waits[todo.pop()]
        reached.update(behind)
        todo += behind
    assert reached == set(names)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--name=Run_1", "'Run_1'"),
        ("--name=a-name-that-is-longer-than-others", "at most 30"),
        ("--experts=chart=m", "--expert-image"),
        ("--experts=chart --expert-image=i", "NAME=MODEL"),
        ("--experts=Chart=m --expert-image=i", "'Chart'"),
        (f"--experts={','.join(f'e{i}=m' for i in range(18))} --expert-image=i", "at most 17"),
        ("--accelerator=v5litepod-48", "v5litepod-48"),
        ("--accelerator=v5p-10", "v5p-10"),
        ("--accelerator=v5p-9", "v5p-9"),
        ("--accelerator=b300x8", "b300x8"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(cloud: Cloud, flags: str, said: str) -> None:
    result = cloud.launch(f"{SUBMIT} {flags}")
    assert result.returncode == 78 and said in result.stderr
    assert not cloud.calls("apply")


def test_templates_name_nothing_that_is_not_set() -> None:
    """Each is in a golden file, rendered without an error; so this guards against one that no script applies."""
    used = "".join(script.read_text() for script in (REPOSITORY / "launch/gke").glob("*.sh"))
    for template in (REPOSITORY / "launch/gke/manifests").glob("*.yaml"):
        name = template.name.replace("queue-tpu", "queue-$(is_tpu").replace("queue-gpu", "queue-$(is_tpu")
        assert name.removesuffix(".yaml") in used or template.name in ("hosted.yaml", "fill.yaml")


def test_shapes_are_those_of_the_slice_check() -> None:
    text = (REPOSITORY / "launch/gke/shared.sh").read_text()
    flat, cube = [
        {int(count): shape for count, shape in re.findall(r"\[(\d+)\]=(\S+?)[\s)]", table)}
        for table in re.findall(r"^declare -A (?:FLAT|CUBE)=(.*?\))$", text, re.MULTILINE | re.DOTALL)
    ]
    assert flat == {**slices._ONE_MACHINE, 1: "1x1", **slices._FLAT}  # GKE has a name for one chip
    assert cube == {2 * chips: shape for chips, shape in slices._CUBES.items()}


@pytest.mark.parametrize(
    "accelerator", ["v5litepod-4", "v5litepod-8", "v5litepod-256", "v5p-8", "v5p-256", "v6e-32", "h100x4", "h200x8x3"]
)
def test_machines_are_those_of_the_slice_check(cloud: Cloud, accelerator: str) -> None:
    slice = parse_accelerator(accelerator)
    printed = cloud.launch(f"{SUBMIT} --accelerator={accelerator} --dry-run").stdout
    assert re.findall(r"completions: (\d+)", printed) == [str(slice.hosts)]
    assert re.findall(r"(?:google.com/tpu|nvidia.com/gpu): (\d+)", printed) == [str(slice.devices)]
    if slice.platform == "tpu":
        (shape,) = re.findall(r"gke-tpu-topology: (\S+)", printed)
        assert slice.topology.endswith(f":{shape}")
