#!/usr/bin/env bash
# Shows what a run on GKE prints: its first host, or one of its experts.
#
#   launch/gke/logs.sh --name=run1 [--host=3] [--role=chart] [--follow]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
required name "name of the run"
optional role trainer "trainer, or the name of an expert"
optional host 0 "number of the host"
switch follow "go on until interrupted"
a_namespace
settings_from "$@"

job=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/replicatedjob-name=$ROLE
on_cluster logs "--namespace=$NAMESPACE" "--selector=$job,batch.kubernetes.io/job-completion-index=$HOST" --tail=200 \
  ${FOLLOW:+--follow}
