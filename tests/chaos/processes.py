"""Processes below this one: found by what they call themselves, ended, stopped and let go on, each by its own id.

With `orphans_stay_ours` whatever a command leaves behind is a child of this process and can be found, however it ended.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SET_CHILD_SUBREAPER = 36
"""Of `prctl`, see linux/prctl.h."""


class ChaosError(Exception):
    """Raised when the farm did what nothing that was done to it explains."""


def title(process: psutil.Process) -> str:
    """What a process calls itself: Ray's workers name their actor, its daemons their program."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return Path(words[0]).name if words and "/" in words[0] else " ".join(words).strip()


def below(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Every process that descends from `process`, this one where it is left out."""
    try:
        return (process or psutil.Process()).children(recursive=True)
    except psutil.Error:
        return []


def end(pid: int) -> None:
    """SIGKILL; a process that is gone already is fine."""
    _send(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """SIGSTOP."""
    _send(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    """SIGCONT."""
    _send(pid, signal.SIGCONT)


@contextmanager
def orphans_stay_ours() -> Iterator[None]:
    """Adopt what descends from this process and loses its parent, instead of init."""
    _adopt(True)
    try:
        yield
    finally:
        _adopt(False)


def bury() -> None:
    """Take note of adopted processes that ended; the others are waited for by whoever started them."""
    for child in psutil.Process().children():
        with suppress(psutil.Error, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE and child.pid not in _STARTED:
                os.waitpid(child.pid, os.WNOHANG)


def started(process: psutil.Popen) -> psutil.Popen:
    """Say that a process is waited for by whoever started it."""
    _STARTED.add(process.pid)
    return process


def await_end(processes: Iterable[psutil.Process], *, seconds: float) -> list[psutil.Process]:
    """Wait until they have ended; returns those that have not, stragglers that end by themselves left out."""
    left = list(processes)
    until = time.monotonic() + seconds
    while left and time.monotonic() < until:
        bury()
        left = [process for process in left if _lives(process)]
        time.sleep(0.1)
    return left


_STARTED: set[int] = set()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _adopt(yes: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, int(yes), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl refused to make this process a subreaper")
