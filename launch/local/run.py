#!/usr/bin/env python3
"""Runs one command in several processes on this machine, to try what a cluster does.

    launch/local/run.py --processes=2 [--devices=1] [--dry-run] -- \\
      python -m maestro_jax.train --config=configs/quickstart.py --workdir=runs/two [--config.mesh.fsdp=-1 ...]

The processes find each other through MAESTRO_COORDINATOR, on loopback (docs/processes.md). Each line of their output
begins with the number of the process. SIGTERM, SIGINT and SIGHUP are passed on to all of them. When one fails, the
others are given some seconds to end by themselves. --devices gives each so many fake CPU devices.

Exit code: 0 if all are done; else 78, 70 or 75, whichever comes first in this order among those of the processes; else
that of the process that ended first. (Standard library only.)
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

GRACE_SECONDS = 30  # for the others, when one has failed
WORST = (78, 70, 75)  # what the user has to change, a fault, told to stop; a lost process (69) only follows from others


def main() -> int:
    options = parse()
    address = f"127.0.0.1:{free_port()}"
    environments = [told(options, address, number) for number in range(options.processes)]
    if options.dry_run:
        for environment in environments:
            print("env", *[shlex.quote(f"{name}={value}") for name, value in environment.items()], end=" ")
            print(shlex.join(options.command))
        return 0
    running = [start(options.command, environment) for environment in environments]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: tell(running, received))
    printing = [threading.Thread(target=show, args=(n, process.stdout)) for n, process in enumerate(running)]
    for thread in printing:
        thread.start()
    code = worst(wait(running))
    for thread in printing:
        thread.join()
    return code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices", type=int, default=0, help="fake CPU devices of each; 0: what it finds")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none of them")
    parser.add_argument("command", nargs="+", help="behind --")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes={options.processes}: at least 1")
    return options


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def told(options: argparse.Namespace, address: str, number: int) -> dict[str, str]:
    """What the environment of a process has besides ours."""
    count = str(options.processes)
    found = {"MAESTRO_COORDINATOR": address, "MAESTRO_PROCESSES": count, "MAESTRO_PROCESS": str(number)}
    if options.devices:
        flags = os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={options.devices}"
        found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(filter(None, flags))}
    return found


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process of its own group: what a terminal sends reaches it through us, once."""
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


def tell(running: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def show(number: int, lines: IO[bytes] | None) -> None:
    for line in lines or ():
        sys.stdout.buffer.write(b"%d: %s" % (number, line))
        sys.stdout.buffer.flush()


def wait(running: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes in the order in which the processes ended; 128 + n where a signal n ended one."""
    left, codes, end = list(running), [], 0.0
    while left:
        for process in [one for one in left if one.poll() is not None]:
            left.remove(process)
            codes.append(process.returncode if process.returncode >= 0 else 128 - process.returncode)
        if any(codes):
            end = end or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > end:
                tell(left, signal.SIGKILL)
        time.sleep(0.05)
    return codes


def worst(codes: list[int]) -> int:
    """The one code that says what to do about all of them."""
    return next((code for code in WORST if code in codes), next(filter(None, codes), 0))


if __name__ == "__main__":
    sys.exit(main())
