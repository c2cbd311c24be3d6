#!/usr/bin/env bash
# Keeps a run going on TPUs that may be taken away: asks for them, sets them up, starts the run, watches, and asks again when
# they are gone. Ends with the run: 0 done, 78 something to correct, 70 after too many faults in a row, of the run or of a command
# of this folder. It may be interrupted and started again; the run does not notice.
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
optional faults 3 "end after so many faults in a row (exit code 70, a lost process, a failed request or command), none an hour after a start"
switch delete-when-done "after exit code 0, delete TPUs and request"
settings_from "$@"

began=$SECONDS started="" faults=0 last="" state=""
began_anew="" # is how the run ended news? Not where it ended before this loop began, or could not be started since.

# Says what is new, and every ten minutes what is not.
report() {
  if [[ $1 != "$last" ]] || ((SECONDS % 600 < PAUSE)); then note "$(date -u +%H:%M:%SZ) +$((SECONDS - began)) s: $1"; fi
  last=$1
}

# TPUs that nobody watches any more cost money all the same.
warn_of_tpus() {
  local command
  command=$(quoted launch/tpu_queued/delete.sh "--name=$NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
  [[ $state != ACTIVE ]] || note "the TPUs are still there and cost money; $command deletes them"
}

# leave CODE MESSAGE: ends the loop.
leave() {
  warn_of_tpus
  fail "$@"
}

fault() {
  [[ -z $started ]] || ((SECONDS - started < 3600)) || faults=0 # it had been going well
  started=""                                                    # a second fault without a start between is one in a row
  faults=$((faults + 1))
  report "$1; fault $faults of $FAULTS"
  ((faults < FAULTS)) ||
    leave "$INTERNAL" "$FAULTS faults in a row, the last: $1; see above and launch/tpu_vm/logs.sh, then start this again"
}

# A command of ours, and its exit code. One that wants something corrected ends the loop, one that says "try again" is for the
# next look. Any other failure is a fault, unless its TPUs are being taken away.
attempt() {
  local code=0 name
  name=$(basename "$1")
  "$@" || code=$?
  case $code in
    0) ;;
    "$CONFIGURATION") leave "$CONFIGURATION" "$name wants something corrected, as said above" ;;
    "$TRY_AGAIN") report "$name ended with $code; looking again in $PAUSE s" ;;
    *) if are_leaving; then report "$name ended with $code as the TPUs went away"; else fault "$name ended with $code"; fi ;;
  esac
  return "$code"
}

# Are the TPUs, there at the last look, being taken away?
are_leaving() {
  [[ $state == ACTIVE ]] || return
  [[ $(node) == @(PREEMPTED|TERMINATED) || $("$LAUNCH/tpu_queued/status.sh") == @(SUSPENDING|SUSPENDED|FAILED|missing) ]]
}

# Only workers that are all set up are told to start.
start() {
  started=$SECONDS began_anew=""
  if attempt "$LAUNCH/tpu_vm/setup.sh" && attempt "$LAUNCH/tpu_vm/run.sh" -- "${REST[@]}"; then began_anew=1; fi
}

ask_for_tpus() { attempt "$LAUNCH/tpu_queued/create.sh" -- "${REST[@]}" || true; }
delete() { attempt "$LAUNCH/tpu_queued/delete.sh" || true; }

node() { gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" '--format=value(state)' 2>/dev/null || echo unknown; }

# Workers that do not answer may be gone before the request says so.
look_closer() {
  local found
  found=$(node)
  case $found in
    PREEMPTED | TERMINATED) report "the TPUs are $found; asking anew" && delete ;;
    *) report "the workers do not answer; the TPUs are $found" ;;
  esac
}

# One look at the run, on TPUs that are there.
attend() {
  local run
  run=$("$LAUNCH/tpu_vm/status.sh")
  case $run in
    running) began_anew=1 && report "running" ;;
    unreachable) look_closer ;;
    idle) report "starting the run" && start ;;
    0)
      report "the run is done"
      if [[ -z $DELETE_WHEN_DONE ]] || ! attempt "$LAUNCH/tpu_queued/delete.sh"; then warn_of_tpus; fi
      exit
      ;;
    75)
      [[ -z $began_anew ]] || faults=0
      report "preempted and saved; going on" && start
      ;;
    78)
      [[ -z $began_anew ]] || leave "$CONFIGURATION" "the run wants something corrected; see launch/tpu_vm/logs.sh"
      report "what the run wanted is taken as corrected" && start
      ;;
    *)
      [[ -z $began_anew ]] || fault "the run ended with $run"
      start
      ;;
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
    missing) report "asking for $ACCELERATOR" && ask_for_tpus ;;
    ACTIVE) attend ;;
    SUSPENDED) report "the TPUs were taken away; asking anew" && delete ;;
    FAILED) fault "the request failed" && delete ;;
    *) report "request: $state" ;;
  esac
  sleep "$PAUSE"
  state=$("$LAUNCH/tpu_queued/status.sh") || state=unknown
done
