"""The one interface of code sandboxes: an untrusted Python program in, what became of it out (no jax in this room).

A program gets the files it is given, standard output and standard error, and nothing else: no network, no other
files, no environment, no processes, a fixed hash seed. Whatever it does ends as a `Ran`, never as an exception.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Protocol


class RanStatus(enum.Enum):
    """How a program ended."""

    OK = "ok"  # it ran to its end, exit code 0
    ERROR = "error"  # it raised or left with another exit code; stderr has the end of the traceback
    TIMEOUT = "timeout"  # CPU or wall time was used up
    MEMORY = "memory"  # memory was used up
    OUTPUT = "output"  # it wrote more than it may; what came before is kept
    UNAVAILABLE = "unavailable"  # the sandbox failed, or the machine is too busy: says nothing about the program


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      cpu_seconds: of computing. A back end that counts instructions instead turns them into seconds at a fixed rate,
        so that its verdict does not depend on the machine.
      wall_seconds: that it may take, computing or asleep. Time in which it waits for a core does not count where the
        kernel tells it apart (/proc/PID/schedstat of Linux), nor does waiting for a turn before it starts: how busy the
        machine is must not change a verdict. A caller that has to end by a certain time cancels.
      memory_bytes: of the whole program, the interpreter included.
      output_bytes: of standard output and of standard error, each.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 30.0
    memory_bytes: int = 256 * 1024 * 1024
    output_bytes: int = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a program left. Texts are foreign, decoded as UTF-8 with replacements, and at most `output_bytes` long.

    Attributes:
      seconds: wall time of the run, the interpreter's start included, waiting for a turn not.
    """

    stdout: str
    stderr: str
    status: RanStatus
    seconds: float


class Sandbox(Protocol):
    """Runs untrusted programs. Neither the program nor a fault of the sandbox raises; cancelling ends the program."""

    name: str  # of the back end: "wasm", "bubblewrap", "unsafe_process"

    async def run(self, program: str, files: Mapping[str, bytes], limits: Limits, stdin: bytes = b"") -> Ran:
        """Runs `program` in a fresh interpreter whose working directory holds `files` (relative names → content).

        Standard input is a file with `stdin`.

        Raises:
          ValueError: a name in `files` is absolute or leads out of the working directory: the caller's mistake.
        """
        ...

    async def close(self) -> None:
        """Ends what runs."""
        ...
