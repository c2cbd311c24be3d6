#!/usr/bin/env bash
# Makes a GKE cluster fit for runs, or goes on where parts of it are there: node pools of the accelerator and of the experts'
# GPUs, both empty until a run wants them, JobSet and Kueue, a queue, rules of the network, a volume.
#
#   launch/gke/cluster.sh --cluster=maestro --location=us-west4 --node-zone=us-west4-a --accelerator=v5litepod-64 \
#     --config=configs/qwen3_vl_4b.py [--experts=4] [-- --config.mesh.tensor=2]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
required cluster "name of the cluster"
required location "its region or zone"
required node-zone "zone of the accelerators"
required accelerator "such as v5litepod-64, v5p-128, v6e-256, h100x8x2"
required config "config file of the run; settings of it may follow --"
optional project "" "project; empty: gcloud's own setting"
switch spot "accelerators that may be taken away at any time"
optional experts "" "most GPU machines for experts at a time; empty: as it is, none at first"
optional expert-machine g2-standard-12 "their type"
optional expert-gpu nvidia-l4 "their GPUs"
optional expert-gpus 1 "GPUs of one of them"
# Filestore writes 350 MiB/s there: the 4B's checkpoint of 53 GB takes 145 s. With standard-rwx (100 MiB/s) it would take
# 505 s, and a run that is stopped has 300. https://cloud.google.com/filestore/docs/performance
optional storage 2560Gi "size of the volume; premium-rwx has no less"
optional storage-class premium-rwx "its class; any that many pods can write to, 53 GB in less than 300 s for the 4B"
optional jobset v0.12.0 "version of JobSet"
optional kueue v0.19.2 "version of Kueue; it needs 0.15 or newer"
optional attempts 10 "how often to try while there is no capacity"
optional pause 60 "seconds between two attempts"
a_namespace
settings_from "$@"
machines_of

# The pool NAME with these machines.
pool() {
  local name=$1
  shift
  local found
  found=$(ask "" gcloud container node-pools describe "$name" "--cluster=$CLUSTER" "${PLACE[@]}" '--format=value(status)')
  if [[ -n $found ]]; then
    note "node pool $name exists: $found"
    return
  fi
  despite shortage gcloud container node-pools create "$name" "--cluster=$CLUSTER" "${PLACE[@]}" \
    "--node-locations=$NODE_ZONE" "$@" --enable-autoscaling --num-nodes=0 --min-nodes=0 ${SPOT:+--spot} ||
    fail "$TRY_AGAIN" "no capacity for node pool $name; run this again later, or with another --node-zone"
}

gpus() { printf -- '--accelerator=type=%s,count=%s,gpu-driver-version=latest' "$1" "$2"; }

# What a published release holds, and waits until it serves.
install() {
  on_cluster apply --server-side "--filename=https://github.com/kubernetes-sigs/$1/releases/download/$2/manifests.yaml"
  on_cluster wait deployment --all --for=condition=Available "--namespace=$1-system" --timeout=300s
}

check_slice
found=$(ask "" gcloud container clusters describe "$CLUSTER" "${PLACE[@]}" '--format=value(status)')
if [[ -n $found ]]; then
  note "cluster $CLUSTER exists: $found"
else
  # Dataplane V2 enforces the rules of the network, the add-on makes the volume.
  run gcloud container clusters create "$CLUSTER" "${PLACE[@]}" --release-channel=regular --enable-dataplane-v2 \
    --addons=GcpFilestoreCsiDriver --machine-type=e2-standard-8 --num-nodes=1
fi
if is_tpu; then
  several=()
  ((HOSTS == 1)) || several=("--tpu-topology=$SHAPE")
  pool "trainers-$ACCELERATOR" "--machine-type=$MACHINE" "${several[@]}" "--max-nodes=$HOSTS"
else
  pool "trainers-$ACCELERATOR" "--machine-type=$MACHINE" "$(gpus "$MODEL" "$CHIPS")" "--max-nodes=$HOSTS"
fi
if ((EXPERTS)); then
  pool "experts-$ACCELERATOR" "--machine-type=$EXPERT_MACHINE" "$(gpus "$EXPERT_GPU" "$EXPERT_GPUS")" "--max-nodes=$EXPERTS"
fi
run gcloud container clusters get-credentials "$CLUSTER" "${PLACE[@]}"
install jobset "$JOBSET"
install kueue "$KUEUE"

# shellcheck disable=SC2034 # the manifests use them
TRAINER_QUOTA=$((HOSTS * CHIPS)) EXPERT_QUOTA=$((EXPERTS * EXPERT_GPUS))
queue=("queue-$(is_tpu && echo tpu || echo gpu).yaml")
if [[ -z $EXPERTS ]]; then
  # Without --experts, one that exists keeps its experts.
  found=$(ask "" kubectl ${CONTEXT:+"--context=$CONTEXT"} get clusterqueue "$ACCELERATOR" '--output=jsonpath={.metadata.name}')
  [[ -z $found ]] || queue=()
fi
apply namespace.yaml volume.yaml network.yaml "${queue[@]}" local-queue.yaml
