"""A bare process: limits on CPU, memory, output and time, and no other protection. For programs one trusts.

It reads and writes files as its user may, and reaches the network.
"""

import sys

from maestro_jax.sandbox.interface import Limits
from maestro_jax.sandbox.process import PROGRAM, Command


class UnsafeProcess:
    """The back end "unsafe_process"."""

    name = "unsafe_process"

    def command(self, directory: str, limits: Limits) -> Command:
        return Command([sys.executable, "-s", "-S", "-B", PROGRAM], {"PYTHONHASHSEED": "0"})

    def close(self) -> None:
        pass
