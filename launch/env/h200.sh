# shellcheck shell=bash
# For runs on H200 GPUs: those of the H100, which differ in memory only.
# shellcheck source=/dev/null
source "${BASH_SOURCE[0]%/*}/h100.sh"
