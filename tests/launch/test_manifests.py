"""Manifests as they are applied, read from the golden files: known to Kubernetes, JobSet and Kueue, and of one mind."""

import copy
import functools
import re
from typing import Any

import jsonschema
import pytest
import yaml

from maestro_jax.errors import EXIT_CONFIG, EXIT_INTERNAL, EXIT_LOST, EXIT_PREEMPTED
from tests.launch.golden import REPOSITORY
from tests.launch.schemas import check

GOLDEN = (REPOSITORY / "tests/launch/golden/gke.txt").read_text()


@functools.cache
def everything() -> list[dict[str, Any]]:
    texts = re.findall(r"<<'MANIFESTS'\n(.*?)^MANIFESTS$", GOLDEN, re.MULTILINE | re.DOTALL)
    by_hand = [(REPOSITORY / f"launch/gke/manifests/{name}.yaml").read_text() for name in ("hosted", "fill")]
    return [manifest for text in [*texts, *by_hand] for manifest in yaml.safe_load_all(text)]


def manifests(kind: str = "") -> list[dict[str, Any]]:
    return [manifest for manifest in everything() if kind in ("", manifest["kind"])]


def role(jobset: dict[str, Any], name: str) -> dict[str, Any]:
    (job,) = [job for job in jobset["spec"]["replicatedJobs"] if job["name"] == name]
    return job["template"]["spec"]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["template"]["spec"]


@pytest.mark.parametrize("number", range(len(manifests())))
def test_a_manifest_is_known_field_by_field(number: int) -> None:
    check(manifests()[number])


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("JobSet", ("spec",)),
        ("JobSet", ("spec", "failurePolicy")),
        ("JobSet", ("spec", "replicatedJobs", 0, "template", "spec")),
        ("JobSet", ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0)),
        ("NetworkPolicy", ("spec", "egress", 0)),
        ("ClusterQueue", ("spec", "resourceGroups", 0)),
        ("PersistentVolumeClaim", ("spec",)),
    ],
)
def test_an_unknown_field_is_refused(kind: str, path: tuple[str | int, ...]) -> None:
    manifest = copy.deepcopy(manifests(kind)[0])
    place: Any = manifest
    for step in path:
        place = place[step]
    place["unknown"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        check(manifest)


def test_exit_codes_decide_what_is_tried_again() -> None:
    jobsets = manifests("JobSet")
    assert len(jobsets) == 3
    for jobset in jobsets:
        rules = role(jobset, "trainer")["podFailurePolicy"]["rules"]
        by_code = {
            code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
        }
        assert by_code == {EXIT_CONFIG: "FailJob", EXIT_PREEMPTED: "Ignore", EXIT_LOST: "Ignore"}
        assert EXIT_INTERNAL not in by_code  # counts
        assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
            container["name"] for container in pod(role(jobset, "trainer"))["containers"]
        }


def test_a_server_of_an_expert_has_weights_of_the_volume_and_nothing_else() -> None:
    """It reaches the internet, so what it could read there could leave."""
    (chart, _, _) = manifests("JobSet")[1]["spec"]["replicatedJobs"]
    container = pod(chart["template"]["spec"])["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"] if mount["name"] == "runs"}
    assert {path: mount["subPath"] for path, mount in mounts.items()} == {
        "/mnt/maestro/huggingface": "huggingface",
        "/mnt/maestro/models": "models",
    }
    assert mounts["/mnt/maestro/models"]["readOnly"]
    assert {"name": "HF_HOME", "value": "/mnt/maestro/huggingface"} in container["env"]


def test_hosts_are_those_of_the_slice() -> None:
    tpu, small, gpu = [role(jobset, "trainer") for jobset in manifests("JobSet")]
    assert [job["completions"] for job in (tpu, small, gpu)] == [16, 4, 2]
    assert pod(tpu)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
    assert pod(tpu)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod(gpu)["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    environment = {entry["name"]: entry.get("value") for entry in pod(gpu)["containers"][0]["env"]}
    assert environment["MAESTRO_CHIP"] == "h100"
    assert (
        environment["MAESTRO_COORDINATOR"] == "run1-trainer-0-0.run1:61440" and environment["MAESTRO_PROCESSES"] == "2"
    )


def test_a_setting_reaches_the_run_as_it_was_given() -> None:
    command = pod(role(manifests("JobSet")[1], "trainer"))["containers"][0]["args"]
    assert command[-1] == "--config.data.train_files=('a b',)"


def test_the_trainer_waits_for_its_experts_and_the_run_ends_with_it() -> None:
    jobset = manifests("JobSet")[1]
    trainer = jobset["spec"]["replicatedJobs"][-1]
    assert trainer["dependsOn"] == [{"name": "chart", "status": "Ready"}, {"name": "ocr", "status": "Ready"}]
    assert jobset["spec"]["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["trainer"]}


def test_the_first_job_depends_on_none() -> None:
    """JobSet's webhook refuses the field there, even with an empty list."""
    for jobset in manifests("JobSet"):
        assert "dependsOn" not in jobset["spec"]["replicatedJobs"][0]


def test_quotas_admit_the_run() -> None:
    """Kueue admits nothing that asks for a resource which no group covers."""
    (queue, *_), jobset = manifests("ClusterQueue"), manifests("JobSet")[0]
    local = manifests("LocalQueue")[0]
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    namespace = manifests("Namespace")[0]
    assert namespace["metadata"]["labels"].items() >= queue["spec"]["namespaceSelector"]["matchLabels"].items()
    quotas = {
        resource["name"]: resource["nominalQuota"]
        for group in queue["spec"]["resourceGroups"]
        for flavor in group["flavors"]
        for resource in flavor["resources"]
    }
    assert quotas == {"google.com/tpu": 64, "nvidia.com/gpu": 4}
    job = role(jobset, "trainer")
    asked = pod(job)["containers"][0]["resources"]["limits"]
    assert {name: count * job["parallelism"] for name, count in asked.items()} == {"google.com/tpu": 64}


def test_rules_of_the_network_name_the_roles_of_the_pods() -> None:
    roles = {
        policy["metadata"]["name"]: policy["spec"]["podSelector"].get("matchLabels", {}).get("maestro/role")
        for policy in manifests("NetworkPolicy")
    }
    assert roles == {"nobody": None, "trainers": "trainer", "experts": "expert", "hosted": "trainer"}
    labels = {
        job["template"]["spec"]["template"]["metadata"]["labels"]["maestro/role"]
        for jobset in manifests("JobSet")
        for job in jobset["spec"]["replicatedJobs"]
    }
    assert labels == {"trainer", "expert"}
