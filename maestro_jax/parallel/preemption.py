"""Signals that ask a command to stop: SIGTERM (a machine is taken away, a time limit is near) and SIGINT.

A command listens from its start (`maestro_jax/command.py`). A signal then raises `Preempted` in the main thread,
wherever it is. Inside `at_boundaries` it is noted instead: waits ask `requested` and end early, and where everything is
in order the command asks `check`, which raises.

Python runs its handlers between two of its own instructions, so not while XLA compiles or the main thread waits for a
device. A thread of ours hears at once, through the pipe that the interpreter's C handler writes to: the callback thread
that waits for an expert knows, and a second signal ends a command that is deaf. Killed is what any run may be.

Of several processes each tells the others what it hears, so that all of them come to the next boundary soon.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from maestro_jax.errors import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers pass on what a terminal or a scheduler has sent to the whole group already: that is no second signal.
SAME_SIGNAL_SECONDS = 1.0
ASK_SECONDS = 0.5  # between looks at what other processes have heard


class Preempted(BaseException):
    """The command was told to stop. Like KeyboardInterrupt it is no fault, so nothing that handles faults takes it.

    Args:
      agreed: whether all processes of the run stop here.

    Attributes:
      saved: what the next start goes on from, in a few words.
      reason: why it stops; empty for a signal.
    """

    def __init__(self, agreed: bool, reason: str = ""):
        super().__init__()
        self.agreed = agreed
        self.saved = ""
        self.reason = reason


class _Heard:
    """What this process was told; one per process, since signals are."""

    def __init__(self) -> None:
        self.signal = ""  # name of the first one
        self.time = 0.0  # when it was heard
        self.at_boundaries = False
        self.raised = False  # once is enough: what follows is the way out
        self.listening = False
        self.tell: Callable[[str], None] = lambda name: None  # other processes
        self.told: Callable[[], str] | None = None  # what any of them has told
        self.any_of: Callable[[bool], bool] = bool  # of all processes, at a boundary of all


_heard = _Heard()


def listen() -> None:
    """Heeds signals from now on; called in the main thread. A signal that whoever started us ignores stays ignored."""
    mine = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in mine:
        signal.signal(number, _handle)
    if not _heard.listening:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
        _heard.listening = True


def among(tell: Callable[[str], None], told: Callable[[], str], any_of: Callable[[bool], bool]) -> None:
    """From now on other processes are told of a signal, and are listened to.

    Args:
      tell, told: called in a thread.
      any_of: whether any process says yes; all of them call it, at the same boundary.
    """
    _heard.tell, _heard.told, _heard.any_of = tell, told, any_of


@contextlib.contextmanager
def at_boundaries() -> Iterator[None]:
    """Inside, a signal does not interrupt: `check` raises where everything is in order."""
    _heard.at_boundaries = True
    try:
        yield
    finally:
        _heard.at_boundaries = False


def requested() -> bool:
    """Whether to stop: then a wait is not worth its while any more."""
    return bool(_heard.signal)


def heard() -> str:
    """The signal, and how long ago it was."""
    return f"{_heard.signal} in {time.monotonic() - _heard.time:.1f} s"


def check() -> None:
    """A boundary, of all processes. Raises `Preempted` in all of them if any was told to stop."""
    if _heard.any_of(requested()):
        stop()


def stop() -> NoReturn:
    """What all processes have agreed on."""
    if not requested():  # it is on its way to this one
        _heard.time, _heard.signal = time.monotonic(), "a signal to another process"
    _heard.raised = True
    raise Preempted(agreed=True)


def give_up(reason: str) -> NoReturn:
    """Ends the run as a signal would, in all processes: what it needs is not there, and may be later."""
    _heard.raised = True
    raise Preempted(agreed=True, reason=reason)


def _handle(number: int, frame: object) -> None:
    _note(number)
    if not (_heard.at_boundaries or _heard.raised):
        _heard.raised = True
        raise Preempted(agreed=False)


def _note(number: int) -> None:
    if not _heard.signal:
        _heard.time, _heard.signal = time.monotonic(), signal.Signals(number).name


def _watch(reader: int) -> None:
    first = 0.0
    while True:
        if not select.select([reader], [], [], ASK_SECONDS)[0]:
            if _heard.told is not None and not requested() and (name := _heard.told()):
                _note(signal.Signals[name])
            continue
        number = os.read(reader, 1)[0]
        if number not in SIGNALS:
            continue
        _note(number)
        if not first:
            first = time.monotonic()
            _heard.tell(_heard.signal)
            if _heard.at_boundaries:
                _say(f"{_heard.signal}: stopping where nothing is lost; a second signal stops at once")
        elif time.monotonic() - first >= SAME_SIGNAL_SECONDS:
            _say("a second signal: stopped at once; the same command goes on from the last checkpoint")
            os._exit(EXIT_PREEMPTED)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())
