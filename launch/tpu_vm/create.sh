#!/usr/bin/env bash
# Creates a TPU VM, or goes on where there is one. Compares the run's mesh with the slice first.
#
#   launch/tpu_vm/create.sh --name=run1 --zone=us-west4-a --accelerator=v5litepod-64 \
#     --config=configs/qwen3_vl_4b.py [-- --config.mesh.tensor=2]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_new_tpu_vm
optional attempts 30 "how often to try while there is no capacity"
optional pause 60 "seconds between two attempts"
settings_from "$@"

state() { ask "" gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" '--format=value(state)'; }

check_commit
check_slice
runtime=$(runtime_version)
found=$(state)
while [[ $found == @(CREATING|STARTING|RESTARTING|REPAIRING) ]]; do
  note "$NAME is $found; asking again in $PAUSE s"
  sleep "$PAUSE"
  found=$(state)
done
case $found in
  READY) note "$NAME exists and is ready" ;;
  "")
    despite shortage gcloud compute tpus tpu-vm create "$NAME" "${PLACE[@]}" "--accelerator-type=$ACCELERATOR" \
      "--version=$runtime" ${NETWORK:+"--network=$NETWORK"} ${SPOT:+--spot} ||
      fail "$TRY_AGAIN" "no capacity in $ZONE; try another --zone, or wait in line with launch/tpu_queued/create.sh"
    ;;
  *) fail "$TRY_AGAIN" "$NAME is $found and will not come back; delete it with launch/tpu_vm/delete.sh, then run this again" ;;
esac
