#!/usr/bin/env bash
# Stands in for Python in a job: ends as line n + 1 of $PLAN says in the n-th restart, an exit code or "wait" for a signal;
# A/B is one for each of two processes.
set -euo pipefail
how=$(sed -n "$((${SLURM_RESTART_COUNT:-0} + 1))p" "$PLAN")
[[ $how != */* ]] || { ((SLURM_PROCID)) && how=${how#*/} || how=${how%/*}; }
[[ $how != wait ]] || trap 'exit 75' TERM
printf 'process %s of %s, restart %s: %s\n' "$SLURM_PROCID" "$SLURM_NTASKS" "${SLURM_RESTART_COUNT:-0}" "$*"
if [[ $how == wait ]]; then
  while :; do sleep 0.2 || true; done # the signal ends it, too
fi
exit "$how"
