"""The process in which wasmtime runs a program; `wasm.py` starts it as a script.

    wasm_guest.py compile SOURCE TARGET
    wasm_guest.py run COMPILED DIRECTORY PROGRAM FUEL MEMORY_BYTES

It ends as the program did: with its exit code, or by SIGXCPU when the fuel is used up, as the kernel ends a process.
Clocks and randomness are functions of how often they were asked; sleeping moves the clocks and takes no time.
"""

import os
import pathlib
import random
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

import wasmtime

WASI = "wasi_snapshot_preview1"
SUCCESS, INVALID = 0, 28  # errno of WASI
CLOCK, REALTIME, ABSOLUTE = 0, 0, 1  # event type, clock, flag of a subscription
MIDNIGHT_2025 = 1_735_689_600 * 10**9  # what the wall clock says at the start, in ns
TICK = 100_000  # ns that pass between two looks at a clock
MAX_SUBSCRIPTIONS = 64
MAX_EXIT_CODE = 125  # above stand signals


def engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    config.consume_fuel = True
    config.cranelift_nan_canonicalization = True  # the one thing in which WebAssembly differs between machines
    return wasmtime.Engine(config)


class Surroundings:
    """What a program can see of the world besides its files: imports of WASI that are the same in every run."""

    def __init__(self) -> None:
        self.passed = 0  # ns
        self.random = random.Random(0)

    def clock_time_get(self, caller: Any, clock: int, precision: int, at: int) -> int:
        self.passed += TICK
        return _write(caller, at, struct.pack("<Q", self._now(clock)))

    def random_get(self, caller: Any, at: int, count: int) -> int:
        if count > 1 << 16:
            return INVALID
        return _write(caller, at, self.random.randbytes(count))

    def poll_oneoff(self, caller: Any, subscriptions: int, events: int, count: int, found: int) -> int:
        """Sleeps by moving the clock; the earliest subscription is the one event."""
        if not 0 < count <= MAX_SUBSCRIPTIONS:
            return INVALID
        size = 48
        given = caller["memory"].read(caller, subscriptions, subscriptions + size * count)
        waits = [self._wait(given[i * size : (i + 1) * size]) for i in range(count)]
        wait, user_data, kind = min(waits)
        self.passed += wait
        _write(caller, events, struct.pack("<QHB21x", user_data, SUCCESS, kind))
        return _write(caller, found, struct.pack("<I", 1))

    def _wait(self, subscription: bytes) -> tuple[int, int, int]:
        """Nanoseconds until it happens, its user data and type; files are always ready."""
        user_data, kind, clock, timeout, _, flags = struct.unpack("<QB7xI4xQQH6x", subscription)
        if kind != CLOCK:
            return 0, user_data, kind
        return max(0, timeout - self._now(clock) if flags & ABSOLUTE else timeout), user_data, kind

    def _now(self, clock: int) -> int:
        return self.passed % 2**62 + (MIDNIGHT_2025 if clock == REALTIME else 0)


def _write(caller: Any, at: int, data: bytes) -> int:
    caller["memory"].write(caller, data, at & 0xFFFFFFFF)
    return SUCCESS


def _linker(made: wasmtime.Engine) -> wasmtime.Linker:
    linker = wasmtime.Linker(made)
    linker.define_wasi()
    linker.allow_shadowing = True
    i32, i64 = wasmtime.ValType.i32(), wasmtime.ValType.i64()
    world = Surroundings()
    imports: list[tuple[Callable[..., int], list[Any]]] = [
        (world.clock_time_get, [i32, i64, i32]),
        (world.random_get, [i32, i32]),
        (world.poll_oneoff, [i32, i32, i32, i32]),
    ]
    for function, arguments in imports:
        kind = wasmtime.FuncType(arguments, [i32])
        linker.define_func(WASI, function.__name__, kind, function, access_caller=True)
    return linker


def compile_module(source: str, target: str) -> None:
    pathlib.Path(target).write_bytes(wasmtime.Module.from_file(engine(), source).serialize())


def run(compiled: str, directory: str, program: str, fuel: int, memory_bytes: int) -> int:
    """The exit code of the program."""
    made = engine()
    store = wasmtime.Store(made)
    store.set_fuel(fuel)
    store.set_limits(memory_size=memory_bytes)
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", "-s", "-S", "-B", program]
    wasi.env = [("PYTHONHASHSEED", "0")]
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.preopen_dir(directory, ".", fs_mutable=False)
    store.set_wasi(wasi)
    instance = _linker(made).instantiate(store, wasmtime.Module.deserialize_file(made, compiled))
    start: Any = instance.exports(store)["_start"]
    try:
        start(store)
    except wasmtime.ExitTrap as left:
        return min(left.code, MAX_EXIT_CODE)
    except wasmtime.Trap as trap:
        if trap.trap_code is wasmtime.TrapCode.OUT_OF_FUEL:
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGXCPU)
        print(f"the interpreter was stopped: {trap.message.splitlines()[-1]}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str]) -> int:
    if arguments[0] == "compile":
        compile_module(*arguments[1:])
        return 0
    compiled, directory, program, fuel, memory_bytes = arguments[1:]
    return run(compiled, directory, program, int(fuel), int(memory_bytes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
