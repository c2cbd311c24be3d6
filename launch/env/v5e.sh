# shellcheck shell=bash
# For runs on TPU v5e: `source launch/env/v5e.sh`. What is set already stays.

# A run whose TPU does not start ends, instead of going on on the CPU. The CPU stays for what the host computes.
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}

# No LIBTPU_INIT_ARGS: what the flags of v5p.sh do is the default for v5e. With and without them the compiler (libtpu
# 0.0.42) made the same program for v5e:4x4. Newer compilers (0.0.50) wait for the small gathers of
# tests/launch/compile_for_tpu.py, whatever flags they get.
