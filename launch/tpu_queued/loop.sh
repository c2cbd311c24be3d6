#!/usr/bin/env bash
# Keeps a run going on TPUs that may be taken away: asks for them, sets them up, starts the run, watches, and asks again when
# they are gone. Ends with the run: 0 done, 78 something to correct, 70 after too many faults in a row. It may be interrupted and
# started again; the run does not notice.
#
#   launch/tpu_queued/loop.sh --name=run1 --zone=us-west4-a --accelerator=v5litepod-64 --spot --share=10.0.0.2:/maestro \
#     --config=configs/qwen3_vl_4b.py --workdir=/mnt/maestro/run1 [-- --config.mesh.tensor=2]
#
# It deletes requests that are SUSPENDED or FAILED or whose TPUs are gone, to ask anew. TPUs that are there it deletes only with
# --delete-when-done, and then only after exit code 0.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_new_tpu_vm
required workdir "directory of the run, below the share: /mnt/maestro/..."
required share "SERVER:/SHARE (NFS, such as Filestore), which outlives the TPUs"
optional keys "" "file of NAME=VALUE lines: the experts' API keys"
optional valid-until "" "a request gives up after this time, such as 6h; empty: never"
optional attempts 10 "how often to try a command that finds no answer"
optional pause 30 "seconds between two looks"
optional faults 3 "end after so many faults in a row (exit code 70, a lost process, a failed request), none an hour after a start"
switch delete-when-done "after exit code 0, delete TPUs and request"
settings_from "$@"

began=$SECONDS started=$SECONDS faults=0 last=""

# Says what is new, and every ten minutes what is not.
report() {
  if [[ $1 != "$last" ]] || ((SECONDS % 600 < PAUSE)); then note "$(date -u +%H:%M:%SZ) +$((SECONDS - began)) s: $1"; fi
  last=$1
}

fault() {
  ((SECONDS - started < 3600)) || faults=0 # it had been going well
  faults=$((faults + 1))
  report "$1; fault $faults of $FAULTS"
  ((faults < FAULTS)) || fail "$INTERNAL" "$FAULTS faults in a row, the last: $1; see launch/tpu_vm/logs.sh, then start this again"
}

# A command of ours that may fail because the TPUs went away meanwhile: the next look tells. What has to be corrected ends it.
attempt() {
  local code=0
  "$@" || code=$?
  ((code != CONFIGURATION)) || exit "$CONFIGURATION"
  ((code == 0)) || report "$(basename "$1") ended with $code; looking again in $PAUSE s"
}

start() {
  started=$SECONDS
  attempt "$LAUNCH/tpu_vm/setup.sh"
  attempt "$LAUNCH/tpu_vm/run.sh" -- "${REST[@]}"
}

delete() { attempt "$LAUNCH/tpu_queued/delete.sh"; }

# Workers that do not answer may be gone before the request says so.
look_closer() {
  local node
  node=$(gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" '--format=value(state)' 2>/dev/null) || node=unknown
  case $node in
    PREEMPTED | TERMINATED) report "the TPUs are $node; asking anew" && delete ;;
    *) report "the workers do not answer; the TPUs are $node" ;;
  esac
}

# One look at the run, on TPUs that are there.
attend() {
  local run
  run=$("$LAUNCH/tpu_vm/status.sh")
  case $run in
    running) report "running" ;;
    unreachable) look_closer ;;
    idle) report "starting the run" && start ;;
    0)
      report "the run is done"
      [[ -z $DELETE_WHEN_DONE ]] || delete
      exit
      ;;
    75) faults=0 && report "preempted and saved; going on" && start ;;
    78) fail "$CONFIGURATION" "the run wants something corrected; see launch/tpu_vm/logs.sh" ;;
    *) fault "the run ended with $run" && start ;;
  esac
}

if dry; then
  "$LAUNCH/tpu_queued/create.sh" -- "${REST[@]}"
  "$LAUNCH/tpu_queued/status.sh"
  start
  "$LAUNCH/tpu_vm/status.sh"
  [[ -z $DELETE_WHEN_DONE ]] || delete
  exit
fi

state=$("$LAUNCH/tpu_queued/status.sh") # without an answer to the first question, something is wrong with gcloud's settings
while true; do
  case $state in
    missing) report "asking for $ACCELERATOR" && attempt "$LAUNCH/tpu_queued/create.sh" -- "${REST[@]}" ;;
    ACTIVE) attend ;;
    SUSPENDED) report "the TPUs were taken away; asking anew" && delete ;;
    FAILED) fault "the request failed" && delete ;;
    *) report "request: $state" ;;
  esac
  sleep "$PAUSE"
  state=$("$LAUNCH/tpu_queued/status.sh") || state=unknown
done
