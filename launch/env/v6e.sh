# shellcheck shell=bash
# For runs on TPU v6e: the flags of the v5p, without which an older compiler, too, stops computing for every gather.
# shellcheck source=/dev/null
source "${BASH_SOURCE[0]%/*}/v5p.sh"

# A newer one (libtpu 0.0.50) gathers on the chip's SparseCores meanwhile, where it is told to.
if [[ ${LIBTPU_INIT_ARGS-} != *fuse_all_gather=true* ]]; then
  export LIBTPU_INIT_ARGS="--xla_tpu_enable_sparse_core_collective_offload_all_gather=true ${LIBTPU_INIT_ARGS-}"
fi
