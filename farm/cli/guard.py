"""Run a command in a child process, so that a native library cannot have the last word.

Ray's C++ ends its process with code 1 where its daemons die at the wrong moment, and may abort it; no handler, thread or
timer of Python's runs then. The parent does nothing but wait, hand signals on, and say in our words what happened.
"""

import ctypes
import os
import signal
from collections.abc import Callable
from typing import NoReturn

HANDED_ON = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
WATCHED = HANDED_ON | {signal.SIGCHLD}
LOOK_EVERY_S = 1.0
PR_SET_PDEATHSIG = 1
SI_KERNEL = 0x80
"""A signal's code where the terminal sent it, to child and parent alike."""


_writer: int | None = None
"""Where a guarded child says its exit code."""


class CommandDiedError(Exception):
    """Raised in the parent where the child ended without saying its exit code; `args[0]` says how."""


def guarded(command: Callable[[], int]) -> int:
    """Run `command` in a child process and return its exit code. Raises CommandDiedError.

    The child dies with this process, however that ends. Call it before anything starts a thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _die_with(parent)
        _set_writer(writer)
        leave(command())
    os.close(writer)
    status = _wait(child)
    said = os.read(reader, 1)
    if said:
        return said[0]
    how = f"code {status}" if status >= 0 else signal.Signals(-status).name
    raise CommandDiedError(how)


def leave(code: int) -> NoReturn:
    """End this process at once with an exit code of ours; the way out where the main thread cannot return."""
    if _writer is not None:
        os.write(_writer, bytes([code]))
    os._exit(code)


def _wait(child: int) -> int:
    """Hand on signals until the child has ended; returns its exit code, negative for a signal."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        came = signal.sigtimedwait(WATCHED, LOOK_EVERY_S)
        # After this process was stopped and let go on, what is returned may be no signal at all.
        if came is not None and came.si_signo in HANDED_ON and came.si_code != SI_KERNEL:
            os.kill(child, came.si_signo)


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _set_writer(writer: int) -> None:
    global _writer  # noqa: PLW0603  one for the process, as its exit code is
    _writer = writer
