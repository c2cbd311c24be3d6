#!/usr/bin/env bash
# Shows what the run prints on a worker of a TPU VM.
#
#   launch/tpu_vm/logs.sh --name=run1 --zone=us-west4-a [--worker=3] [--follow]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
optional worker 0 "number of the worker, or all"
switch follow "go on until interrupted"
settings_from "$@"

run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" "--worker=$WORKER" \
  "--command=$(quoted bash maestro/launch/tpu_vm/worker.sh logs ${FOLLOW:+--follow})"
