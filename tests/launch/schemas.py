"""What Kubernetes, JobSet and Kueue accept; unknown fields are refused, as a server with strict validation does.

Kubernetes: the strict schemas of the package kubernetes-validate. JobSet: the models of kubeflow-trainer-api, which are
made from its OpenAPI; its pods are checked as those of a Kubernetes job. Kueue has no such package: written here from
the CRDs of v0.19 (kueue.x-k8s.io/v1beta2), as far as the manifests go.
"""

import functools
from typing import Any

import jsonschema
import kubernetes_validate
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

VERSION = "1.37"


def check(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    match manifest["apiVersion"], manifest["kind"]:
        case "jobset.x-k8s.io/v1alpha2", "JobSet":
            jsonschema.validate(manifest, jobset())
            for job in manifest["spec"]["replicatedJobs"]:
                metadata = {"name": job["name"], **job["template"].get("metadata", {})}
                as_job = {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "metadata": metadata,
                    "spec": job["template"]["spec"],
                }
                kubernetes_validate.validate(as_job, VERSION, strict=True)
        case "kueue.x-k8s.io/v1beta2", kind:
            metadata = record(name=TEXT, namespace=TEXT, optional=("namespace",))
            jsonschema.validate(manifest, record(apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=KUEUE[kind]))
        case _:
            kubernetes_validate.validate(manifest, VERSION, strict=True)


@functools.cache
def jobset() -> dict[str, Any]:
    schema = strict(JobsetV1alpha2JobSet.model_json_schema(by_alias=True))
    schema["$defs"]["IoK8sApiBatchV1JobTemplateSpec"] = {"type": "object"}  # checked as a job
    return schema


def strict(schema: Any) -> Any:
    """The schema, but objects with named properties have no others."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    return {**found, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else found


def record(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    needed = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
LABELS = {"type": "object", "additionalProperties": TEXT, "minProperties": 1}
QUANTITY = {"anyOf": [{"type": "integer", "minimum": 0}, TEXT]}
KUEUE = {
    "ResourceFlavor": record(nodeLabels=LABELS),
    "ClusterQueue": record(
        namespaceSelector=record(matchLabels=LABELS),
        queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        preemption=record(withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}),
        resourceGroups=many(
            record(
                coveredResources=many(TEXT),
                flavors=many(record(name=TEXT, resources=many(record(name=TEXT, nominalQuota=QUANTITY)))),
            )
        ),
    ),
    "LocalQueue": record(clusterQueue=TEXT),
}
