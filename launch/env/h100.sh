# shellcheck shell=bash
# For runs on H100 GPUs: `source launch/env/h100.sh`. What is set already stays, and wins.

# A run whose GPUs do not start ends, instead of going on on the CPU. The CPU stays for what the host computes.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}

# JAX takes 75 % of a GPU's memory unless told; nothing else runs there, and NCCL and cuBLAS want some. `plan` reckons
# with nine tenths, too. https://docs.nvidia.com/jax-toolbox, "Flags to manage memory used in JAX/XLA"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

FLAGS=(
  # Gathers of weights go on while other layers are computed; off by default.
  # https://docs.nvidia.com/jax-toolbox/environment-variables: the one flag of NVIDIA's own JAX images
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Same seed, same bits: no scatter by atomic adds, whose order is chance. (XLA still chooses the fastest kernels by
  # timing them when it compiles. --xla_gpu_deterministic_ops=true stops that too, where bits must survive a restart.)
  # https://docs.jax.dev, "XLA compiler flags"; xla/debug_options_flags.cc
  --xla_gpu_exclude_nondeterministic_ops=true
)
export XLA_FLAGS="${FLAGS[*]} ${XLA_FLAGS-}"
unset FLAGS
