#!/usr/bin/env bash
# Shows what a run on GKE prints: its first host, or one of its experts. Of several pods, since each start makes one, the newest.
#
#   launch/gke/logs.sh --name=run1 [--host=3] [--role=chart] [--follow]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
required name "name of the run"
optional role trainer "trainer, or the name of an expert"
optional host 0 "number of the host"
switch follow "go on until the pod ends"
a_namespace
settings_from "$@"

job=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/replicatedjob-name=$ROLE
job+=,batch.kubernetes.io/job-completion-index=$HOST
pod=$(ask POD kubectl ${CONTEXT:+"--context=$CONTEXT"} get pods "--namespace=$NAMESPACE" "--selector=$job" \
  --sort-by=.metadata.creationTimestamp --output=name | tail -n 1)
[[ -n $pod ]] || fail "$TRY_AGAIN" "run $NAME has no pod of host $HOST of $ROLE now; see launch/gke/status.sh"
on_cluster logs "$pod" "--namespace=$NAMESPACE" --tail=200 ${FOLLOW:+--follow}
