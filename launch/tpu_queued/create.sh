#!/usr/bin/env bash
# Asks for a TPU VM and stays in line for it, or goes on where that has been asked. Compares mesh and slice first.
#
#   launch/tpu_queued/create.sh --name=run1 --zone=us-west4-a --accelerator=v5litepod-64 --spot \
#     --config=configs/qwen3_vl_4b.py [-- --config.mesh.tensor=2]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_new_tpu_vm
optional valid-until "" "give up after this time, such as 6h; empty: never"
optional attempts 10 "how often to ask while there is no answer"
optional pause 30 "seconds between two attempts"
settings_from "$@"

check_commit
check_slice
runtime=$(runtime_version)
state=$(ask "" gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)')
case $state in
  "")
    despite shortage gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "--node-id=$NAME" \
      "--accelerator-type=$ACCELERATOR" "--runtime-version=$runtime" ${NETWORK:+"--network=$NETWORK"} \
      ${VALID_UNTIL:+"--valid-until-duration=$VALID_UNTIL"} ${SPOT:+--spot} ||
      fail "$TRY_AGAIN" "the request was not taken; run this again later, or try another --zone"
    ;;
  SUSPENDED | FAILED)
    fail "$TRY_AGAIN" "request $NAME is $state for good; delete it with launch/tpu_queued/delete.sh, or let loop.sh ask anew"
    ;;
  *) note "request $NAME exists: $state" ;;
esac
