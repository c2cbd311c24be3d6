#!/usr/bin/env bash
# Says in one word how a request stands: missing, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, FAILED, ...
#
#   launch/tpu_queued/status.sh --name=run1 --zone=us-west4-a
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
settings_from "$@"

state=$(ask "" gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)')
dry || printf '%s\n' "${state:-missing}"
