"""This interpreter in namespaces of its own (bubblewrap): no network, no processes but one, nothing to write to.

The program can read what it was given, the interpreter's installation and the system's libraries. A filter of
system calls (seccomp) refuses new processes and threads, sockets, and memory that the limit does not count.
"""

import os
import pathlib
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable

from maestro_jax.errors import ConfigError
from maestro_jax.sandbox.interface import Limits
from maestro_jax.sandbox.process import PROGRAM, Command

_WORK = "/work"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_PROBE_SECONDS = 30.0

# bwrap takes the filter from a file descriptor, which the shell opens anew for every program.
_WITH_FILTER = 'exec "$@" 9<"$0"'


class Bubblewrap:
    """The back end "bubblewrap".

    Raises:
      ConfigError: there is no bwrap, or it may not make namespaces here.
    """

    name = "bubblewrap"

    def __init__(self) -> None:
        path, machine = shutil.which("bwrap"), platform.machine()
        if path is None or machine not in REFUSED:
            raise ConfigError(f'sandbox "bubblewrap" needs bwrap, on {" or ".join(REFUSED)}; install bubblewrap')
        self._bwrap = path
        self._directory = tempfile.TemporaryDirectory(prefix="sandbox-bwrap-", ignore_cleanup_errors=True)
        self._filter = os.path.join(self._directory.name, "seccomp")
        pathlib.Path(self._filter).write_bytes(system_call_filter(machine))
        self._probe()

    def command(self, directory: str, limits: Limits) -> Command:
        # A symlink to the interpreter leads out of what is visible inside.
        interpreter, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
        binds = ["--ro-bind", prefix, prefix, "--ro-bind", directory, _WORK]
        for library in _LIBRARIES:
            binds += ["--ro-bind-try", library, library]
        isolated = ["--unshare-all", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL"]
        ended = ["--die-with-parent", "--new-session", "--seccomp", "9"]
        where = ["--remount-ro", "/", "--chdir", _WORK, "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
        python = [interpreter, "-s", "-S", "-B", PROGRAM]
        shell = ["sh", "-c", _WITH_FILTER, self._filter]
        return Command([*shell, self._bwrap, *isolated, *ended, *binds, *where, *python], {})

    def close(self) -> None:
        self._directory.cleanup()

    def _probe(self) -> None:
        """bwrap may be installed and yet not be allowed to do its work, inside a container for example."""
        with tempfile.TemporaryDirectory() as directory:
            pathlib.Path(directory, PROGRAM).write_text("print('ready')")
            command = self.command(directory, Limits())
            ran = subprocess.run(command.arguments, env={}, capture_output=True, timeout=_PROBE_SECONDS)
        if ran.stdout != b"ready\n":
            reason = ran.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise ConfigError(f"bwrap does not work here ({reason}); allow user namespaces, or use another sandbox")


# ---- system calls ------------------------------------------------------------------------------------------

# Numbers by machine (asm/unistd.h): fork, vfork, clone, clone3; socket, socketpair; ptrace, process_vm_readv and
# -writev; memory beyond RLIMIT_AS: memfd_create, memfd_secret, shmget, msgget, semget, mq_open; and what has been
# a way out before: bpf, add_key, request_key, keyctl, userfaultfd, perf_event_open, io_uring_setup, unshare, setns,
# mount, pivot_root, open_by_handle_at.
REFUSED = {
    "x86_64": (57, 58, 56, 435, 41, 53, 101, 310, 311, 319, 447, 29, 68, 64, 240)
    + (321, 248, 249, 250, 323, 298, 425, 272, 308, 165, 155, 304),
    "aarch64": (220, 435, 198, 199, 117, 270, 271, 279, 447, 194, 186, 190, 180)
    + (280, 217, 218, 219, 282, 241, 425, 97, 268, 40, 41, 265),
}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_X32 = 0x40000000  # calls of another ABI on x86_64 start here
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # linux/seccomp.h; the last is ERRNO with EPERM
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data


def system_call_filter(machine: str) -> bytes:
    """A seccomp program: `REFUSED` fail with EPERM, another architecture's calls end the process."""
    refused = REFUSED[machine]
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, len(refused) + 1, 0, _X32),
    ]
    steps += [(_IF_EQUAL, len(refused) - i, 0, number) for i, number in enumerate(refused)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return _assembled(steps)


def _assembled(steps: Iterable[tuple[int, int, int, int]]) -> bytes:
    """Instructions (code, steps over if true, steps over if false, constant) as struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
