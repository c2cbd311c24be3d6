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
  # shellcheck source=/dev/null
  source "$flags"
fi
exec "$@"
