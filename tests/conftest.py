"""Every test runs on the CPU, seen as eight devices; set before anything imports jax."""

import atexit
import os
import shutil
import tempfile

from jaxlib import version

# These halve the time of the whole suite: toy programs are compiled far longer than they run, and they skip LLVM's
# optimiser, not XLA's passes. An XLA that does not know a flag aborts; the second one went with jaxlib 0.11.1.
QUICK_FLAGS = ["--xla_backend_optimization_level=0"]
if version.__version_info__ < (0, 11, 1):
    QUICK_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
FLAGS = ("--xla_force_host_platform_device_count=8", *QUICK_FLAGS)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])

# What several tests compile is compiled once, in whichever process: xdist's workers and commands inherit these.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
