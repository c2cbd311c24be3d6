#!/usr/bin/env bash
# Deletes a TPU VM with its disks; the share stays. A run on it is stopped first, so that it saves.
#
#   launch/tpu_vm/delete.sh --name=run1 --zone=us-west4-a
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
settings_from "$@"

state=$(ask READY gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" '--format=value(state)')
if [[ -z $state ]]; then
  note "$NAME does not exist in $ZONE; nothing to delete"
  exit
fi
if [[ $state == READY ]]; then
  "$LAUNCH/tpu_vm/stop.sh" || note "warning: the run could not be stopped; what it did since its last save is lost"
fi
run gcloud compute tpus tpu-vm delete "$NAME" "${PLACE[@]}" --quiet
