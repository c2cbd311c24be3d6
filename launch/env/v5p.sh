# shellcheck shell=bash
# For runs on TPU v5p: `source launch/env/v5p.sh`. What is set already stays, and wins.

# A run whose TPU does not start ends, instead of going on on the CPU. The CPU stays for what the host computes.
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}

# Weights are gathered while something else is computed, as on v5e by default. Without these two the compiler (libtpu
# 0.0.42) stops computing for every gather; one of them alone changes nothing, and the other three that MaxText sets
# with them (benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER) are on already. The price is memory for what is under
# way: `source` this before `python -m maestro_jax.plan`, which then counts it.
#
# Newer compilers (0.0.50 was tried) refuse them on this chip, for fear of wrong results. There gathers wait.
# PYTHON is that of the run; what it has installed decides.
if "${PYTHON:-python3}" -c 'from importlib.metadata import version
raise SystemExit(tuple(map(int, version("libtpu").split(".")[:3])) > (0, 0, 42))' 2>/dev/null; then
  FLAGS=(
    --xla_enable_async_all_gather=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  )
  export LIBTPU_INIT_ARGS="${FLAGS[*]} ${LIBTPU_INIT_ARGS-}"
  unset FLAGS
fi
