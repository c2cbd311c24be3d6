#!/usr/bin/env bash
# Starts a run on a cluster that cluster.sh made, with its experts beside it, or goes on where it is there.
#
#   launch/gke/submit.sh --name=run1 --image=REGISTRY/maestro-tpu:1 --accelerator=v5litepod-64 --config=configs/mine.py \
#     [--experts=chart=DocTron/Chart-R1,ocr=zai-org/GLM-OCR --expert-image=REGISTRY/maestro-experts:1] \
#     [-- --config.mesh.tensor=2]
#
# The registry of the config names the servers by URL. An expert "chart" of run1 is at http://run1-chart-0-0.run1:8000/v1.

# shellcheck disable=SC2034 # manifests use variables of this script
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
required name "name of the run: lower-case letters, digits and -"
required image "image of launch/docker"
required accelerator "such as v5litepod-64, v5p-128, v6e-256, h100x8x2"
required config "config file of the run; settings of it may follow --"
optional workdir "" "directory of the run; empty: /mnt/maestro/NAME"
optional experts "" "NAME=MODEL,NAME=MODEL,...: names as in --name, models as vLLM takes them"
optional expert-image "" "image of launch/docker/experts.Dockerfile"
optional expert-gpu nvidia-l4 "GPU of an expert"
optional expert-gpus 1 "and how many of them"
switch spot "machines may be taken away at any time: more faults before the run ends"
optional faults "" "end after so many faults of one host (exit code 70, a signal); empty: 10, with --spot 100"
a_namespace
settings_from "$@"
machines_of

# A pod is called after the run and its role, in at most 63 characters.
named() {
  if ((${#1} > $2)) || ! [[ $1 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]]; then
    fail "$CONFIGURATION" "'$1' is no name: use at most $2 lower-case letters, digits and -, such as run1"
  fi
}

named "$NAME" 30
check_slice
found=$(ask "" kubectl ${CONTEXT:+"--context=$CONTEXT"} get jobset "$NAME" "--namespace=$NAMESPACE" \
  '--output=jsonpath={.metadata.name} {.status.terminalState}')
case $found in
  "$NAME Completed") note "run $NAME is done; another one needs another --name" && exit ;;
  "$NAME Failed")
    fail "$TRY_AGAIN" "run $NAME has failed; see launch/gke/logs.sh, then delete.sh: submitted again, it goes on from its last checkpoint"
    ;;
  "$NAME"*) note "run $NAME exists; see launch/gke/status.sh" && exit ;;
esac

# The line that makes a job wait until those with these names are ready; nothing without names, for JobSet refuses an empty
# list in the first job. It takes at most five names.
after() {
  local name items=()
  for name in "$@"; do items+=("{name: $name, status: Ready}"); done
  (($# == 0)) || printf '\n      dependsOn: [%s]' "$(IFS=, && echo "${items[*]}")"
}

servers=() names=() EXPERT_IMAGE=$(yaml_string "$EXPERT_IMAGE") EXPERT_JOBS=""
[[ -z $EXPERTS || $EXPERT_IMAGE != '""' ]] || fail "$CONFIGURATION" "--experts needs --expert-image; launch/docker says how to build it"
IFS=, read -ra servers <<<"$EXPERTS"
((${#servers[@]} <= 17)) || fail "$CONFIGURATION" "--experts: at most 17 beside a trainer, for Kueue; serve others elsewhere"
for server in "${servers[@]}"; do
  EXPERT=${server%%=*} model=${server#*=}
  named "$EXPERT" 20
  [[ $server == *=?* ]] || fail "$CONFIGURATION" "--experts: '$server' names no model; write NAME=MODEL"
  # Five lines of experts, one behind the other in each, so that five are enough for the trainer to wait for all.
  DEPENDS_ON=""
  ((${#names[@]} < 5)) || DEPENDS_ON=$(after "${names[-5]}")
  EXPERT_COMMAND=$(yaml_command vllm serve "$model" --served-model-name "$model" --port 8000 "--tensor-parallel-size=$EXPERT_GPUS")
  EXPERT_JOBS+=$'\n'$(rendered "$LAUNCH/gke/manifests/expert.yaml")
  names+=("$EXPERT")
  note "expert $model: http://$NAME-$EXPERT-0-0.$NAME:8000/v1"
done
DEPENDS_ON=$(after "${names[@]: -$((${#names[@]} < 5 ? ${#names[@]} : 5))}")
# JAX ends a host that has lost another with a signal, and nothing tells that from a fault of its own.
: "${FAULTS:=$([[ -n $SPOT ]] && echo 100 || echo 10)}"
RETRIES=$((FAULTS - 1)) CHIP=$(chip) IMAGE=$(yaml_string "$IMAGE")
COMMAND=$(yaml_command python -m maestro_jax.train "--config=$CONFIG" "--workdir=${WORKDIR:-/mnt/maestro/$NAME}" "${REST[@]}")
if is_tpu; then apply run-tpu.yaml; else apply run-gpu.yaml; fi
