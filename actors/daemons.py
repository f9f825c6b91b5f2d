"""Ray's own daemons below this process: whether they live.

Should one die while this process is inside Ray's start, Ray neither returns nor raises: after a minute it ends this
process with a line of its own. Later its calls wait for as long. So we look ourselves, and speak first.
"""

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import psutil

from farm.errors import FarmUnavailableError

LOOK_EVERY_S = 0.2
OWN_WORDS_S = 3.0
"""How long Ray's start has to raise by itself once a daemon has died."""
NAMES = ("gcs_server", "raylet")
CONTROL_STORE_EVERY_S = 2.0
CONTROL_STORE_REFUSALS = 3


class Daemons:
    """Those that this process has started. As a context, calls `give_up` with an error, once and in a thread of its own, if
    one of them dies in the block; `give_up` should end the process."""

    def __init__(self, give_up: Callable[[FarmUnavailableError], object] | None = None):
        self._give_up = give_up
        self._over = threading.Event()
        self._seen: dict[int, tuple[psutil.Process, str]] = {}

    def __enter__(self) -> Self:
        if self._give_up is not None:
            threading.Thread(target=self._watch, args=(self._give_up,), name="ray-daemons", daemon=True).start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._find()

    def check(self) -> None:
        """Raise FarmUnavailableError if one of them has died."""
        died = next((name for child, name in list(self._seen.values()) if _is_dead(child)), None)
        if died is not None:
            raise FarmUnavailableError(
                f"Ray's {died} died, and the farm with it; what was stored is safe: run the command again"
            )

    def _find(self) -> None:
        for child in psutil.Process().children():
            name = _name(child)
            if name in NAMES:
                self._seen.setdefault(child.pid, (child, name))

    def _watch(self, give_up: Callable[[FarmUnavailableError], object]) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._find()
            try:
                self.check()
            except FarmUnavailableError as error:
                if not self._over.wait(OWN_WORDS_S):
                    give_up(error)
                return


class ControlStore:
    """Ray's control store. Without it actors go on for a while, and after a minute Ray ends every process, this one too,
    with no more than a log line of its own: so we look ourselves, and say it in our words before that."""

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._looked_at = 0.0
        self._refused = 0

    def check(self, *, now: bool = False) -> None:
        """Raise FarmUnavailableError once it has refused several looks in a row; looks now and then, or `now`."""
        if not now and time.monotonic() - self._looked_at < CONTROL_STORE_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            socket.create_connection(self._address, timeout=CONTROL_STORE_EVERY_S).close()
            self._refused = 0
        except OSError as exc:
            self._refused += 1
            if self._refused >= CONTROL_STORE_REFUSALS:
                raise FarmUnavailableError(
                    "Ray's control store is gone, and the farm with it; what was stored is safe: run the command again"
                ) from exc


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
