#!/usr/bin/env bash
# Stops the run on a TPU VM as a preemption would: it saves, then ends with 75. run.sh goes on where it stopped.
#
#   launch/tpu_vm/stop.sh --name=run1 --zone=us-west4-a
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
settings_from "$@"

run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all "--command=bash maestro/launch/tpu_vm/worker.sh stop"
