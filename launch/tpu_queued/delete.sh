#!/usr/bin/env bash
# Deletes a request with the TPU VM it was given; the share stays. A run on it is stopped first, so that it saves.
#
#   launch/tpu_queued/delete.sh --name=run1 --zone=us-west4-a
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
settings_from "$@"

state=$(ask ACTIVE gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)')
if [[ -z $state ]]; then
  note "request $NAME does not exist in $ZONE; nothing to delete"
  exit
fi
if [[ $state == ACTIVE ]]; then
  "$LAUNCH/tpu_vm/stop.sh" || note "warning: the run could not be stopped; what it did since its last save is lost"
fi
run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
