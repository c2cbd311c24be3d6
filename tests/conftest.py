"""Every test runs on the CPU, seen as eight devices; set before anything imports jax."""

import os

from jaxlib import version

# These halve the time of the whole suite: toy programs are compiled far longer than they run, and they skip LLVM's
# optimiser, not XLA's passes. An XLA that does not know a flag aborts; the second one went with jaxlib 0.11.1.
QUICK_FLAGS = ["--xla_backend_optimization_level=0"]
if version.__version_info__ < (0, 11, 1):
    QUICK_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
FLAGS = ("--xla_force_host_platform_device_count=8", *QUICK_FLAGS)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])
