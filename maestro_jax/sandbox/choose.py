"""Which sandbox runs programs here."""

from maestro_jax.errors import ConfigError
from maestro_jax.sandbox.bubblewrap import Bubblewrap
from maestro_jax.sandbox.interface import Sandbox
from maestro_jax.sandbox.process import ProcessSandbox
from maestro_jax.sandbox.unsafe import UnsafeProcess
from maestro_jax.sandbox.wasm import Wasm, is_installed

KINDS = ("auto", "wasm", "bubblewrap", "unsafe_process")


def make_sandbox(kind: str) -> Sandbox:
    """A sandbox that has been seen to work.

    Args:
      kind: one of `KINDS`. "auto" takes wasm where it is installed, else bubblewrap, and never "unsafe_process".

    Raises:
      ConfigError: there is none of this kind here.
    """
    if kind == "auto":
        kind = "wasm" if is_installed() else "bubblewrap"
    if kind == "wasm":
        return ProcessSandbox(Wasm())
    if kind == "bubblewrap":
        return ProcessSandbox(Bubblewrap())
    if kind == "unsafe_process":
        return ProcessSandbox(UnsafeProcess())
    raise ConfigError(f"sandbox {kind!r} is unknown; use one of {', '.join(KINDS)}")
