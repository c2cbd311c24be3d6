# shellcheck shell=bash
# For runs on the CPU of a machine that has, or may have, something else: `source launch/env/cpu.sh`.

# Accelerators are not even looked for, which takes seconds, and leaves them to others.
export JAX_PLATFORMS=cpu
