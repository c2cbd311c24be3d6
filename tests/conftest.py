"""Every test runs on the CPU, seen as eight devices; set before anything imports jax."""

import os

# The last two halve the time of the whole suite: toy programs are compiled far longer than they run, and
# these skip LLVM's optimiser, not XLA's passes. An XLA that no longer knows one says so and stops: drop it.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])
