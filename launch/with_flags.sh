#!/usr/bin/env bash
# Runs a command with the flags of a chip (launch/env), where one is named.
#
#   MAESTRO_CHIP=v5e launch/with_flags.sh python -m maestro_jax.train ...
set -euo pipefail

if [[ -n ${MAESTRO_CHIP-} ]]; then
  flags=$(dirname "${BASH_SOURCE[0]}")/env/$MAESTRO_CHIP.sh
  if [[ ! -f $flags ]]; then
    echo "error: MAESTRO_CHIP=$MAESTRO_CHIP has no file in launch/env; use the name of one there, or none" >&2
    exit 78
  fi
  # What can be set depends on what the run's Python has installed.
  case "${1-}" in *python*) export PYTHON=$1 ;; esac
  # shellcheck source=/dev/null
  source "$flags"
  # The driver of a TPU locks memory to move data; a container may lock next to none unless this is raised.
  if [[ $MAESTRO_CHIP == v* ]] && ! ulimit -l unlimited 2>/dev/null; then
    echo "warning: locked memory stays limited ($(ulimit -l) KiB); a TPU may hang: give the container SYS_RESOURCE" >&2
  fi
fi
exec "$@"
