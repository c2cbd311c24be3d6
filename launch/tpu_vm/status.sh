#!/usr/bin/env bash
# Says in one word how the run on a TPU VM stands: idle, running, unreachable, or the exit code that says most.
#
#   launch/tpu_vm/status.sh --name=run1 --zone=us-west4-a
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
settings_from "$@"

ssh_all=(gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all)
worker=maestro/launch/tpu_vm/worker.sh # not there before setup.sh
ask_all=("${ssh_all[@]}" "--command=if [ -e $worker ]; then bash $worker status; else echo idle; fi")
if dry; then
  run "${ask_all[@]}"
  exit
fi
said=$("${ask_all[@]}" 2> >(tail -n 3 >&2)) || said=unreachable

# Workers agree, unless one of them failed by itself: then its code says most. One that still runs will hear of it.
for word in unreachable running 78 other 75 0 idle; do
  case $word in
    other) found=$(grep -oxE '[0-9]+' <<<"$said" | grep -vxE '0|75|78' | head -n 1) || continue ;;
    *) found=$(grep -ox "$word" <<<"$said" | head -n 1) || continue ;;
  esac
  printf '%s\n' "$found"
  exit
done
printf 'unreachable\n'
