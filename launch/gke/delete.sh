#!/usr/bin/env bash
# Deletes a run on GKE with its pods: the trainer saves first. Volume and queue stay, node pools shrink to nothing by themselves.
#
#   launch/gke/delete.sh --name=run1
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
required name "name of the run"
a_namespace
settings_from "$@"

on_cluster delete jobset "$NAME" "--namespace=$NAMESPACE" --ignore-not-found --cascade=foreground
