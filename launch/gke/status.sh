#!/usr/bin/env bash
# Says how a run on GKE stands: in line, running, Completed or Failed, and where its pods are.
#
#   launch/gke/status.sh --name=run1
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
required name "name of the run"
a_namespace
settings_from "$@"

on_cluster get workloads "--namespace=$NAMESPACE" # the line: who is admitted, who waits
on_cluster get pods "--namespace=$NAMESPACE" "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
on_cluster describe jobset "$NAME" "--namespace=$NAMESPACE"
