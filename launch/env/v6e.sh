# shellcheck shell=bash
# For runs on TPU v6e: the flags of the v5p, without which this compiler, too, stops computing for every gather.
# shellcheck source=/dev/null
source "${BASH_SOURCE[0]%/*}/v5p.sh"
