"""Which of several farms on one store a job belongs to: its claim, a small object that the holder keeps renewing.

A claim saves work and guards nothing: a farm that wrongly thinks it holds one renders what another renders too, and the
first receipt counts. So no rule here needs clocks that agree: a holder counts as gone when its claim did not change for
CLAIM_S of the looker's own time, or at once where the looker can see that its process has ended.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from farm.errors import NewerVersionError, ObjectMissingError
from farm.records import Record
from farm.storage.base import ObjectStore

_log = logging.getLogger(__name__)

CLAIM_RENEW_S = 10.0
"""How often the holder of a claim rewrites it."""
CLAIM_S = 30.0
"""A claim that stayed as it is for this long has lost its holder."""
CLAIM_LOOK_S = 3.0
"""How often a farm looks at a claim that another holds."""

_TRIES = 3


class Claim(Record):
    """Who holds a job. `beat` grows with every write, so that no two versions are alike."""

    farm: str = Field(description="drawn once for each farm, kept over restarts of its dispatcher")
    host: str = Field(description="what people call the machine")
    machine: str = Field(
        default="", description="boot and pid namespace, where process ids mean the same; empty: unknown"
    )
    pid: int = Field(default=0, ge=0, description="the process that the farm ends with; 0: it outlives all we know of")
    started: int = Field(default=0, ge=0, description="that process's start, in clock ticks after boot")
    beat: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Hold:
    """Whether a job is this farm's; else `by` says whose."""

    held: bool
    by: str = ""


Lives = Callable[[int, int], bool]
Decision = Literal["renew", "take", "leave"]


def decide(found: Claim | None, me: Claim, *, same_for_s: float, lives: Lives) -> Decision:
    """Decide what to do about a claim that is there; None is one that cannot be read.

    `same_for_s`: for how long it was seen unchanged. `lives(pid, started)`: whether a process of this machine still runs.
    """
    if found is not None:
        if found.farm == me.farm:
            return "renew"
        same_machine = bool(me.machine) and found.machine == me.machine
        # A process has one farm at a time, so an older one of this very process is gone as well.
        if same_machine and found.pid and (found.pid == me.pid or not lives(found.pid, found.started)):
            return "take"
    return "take" if same_for_s >= CLAIM_S else "leave"


@dataclass(frozen=True, slots=True)
class _Sight:
    etag: str
    since: float


class Claims:
    """One farm's claims. Blocks on the store; calls for one job must not overlap.

    `me` is this farm's claim as it would write it. `enforced`: whether the store has conditional replaces, without which
    every job counts as held; found out by the first call where it is not given. `clock`: monotonic seconds. `first`:
    where a new claim begins to count, never the same again: an equal one would have an earlier one's etag.
    """

    def __init__(
        self,
        store: ObjectStore,
        me: Claim,
        *,
        enforced: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        lives: Lives | None = None,
        first: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._me = me
        self._enforced = enforced
        self._clock = clock
        self._lives = lives or process_lives
        self._first = first
        self._sights: dict[str, _Sight] = {}
        self._probing = threading.Lock()

    def hold(self, job: str) -> Hold:
        """Take a job's claim, or renew it, or see who has it. Raises StoreError."""
        if not self._conditional():
            return Hold(True)
        key = _key(job)
        by = "another farm"
        for _ in range(_TRIES):
            asked_at = self._clock()
            info = self._store.head(key)
            if info is None:
                self._sights.pop(job, None)
                if self._store.create(key, self._written(after=self._first())):
                    return self._held(job)
                continue
            sight = self._sights.get(job)
            if sight is None or sight.etag != info.etag:
                self._sights[job] = sight = _Sight(info.etag, self._clock())
            try:
                found = self._found(key)
            except ObjectMissingError:
                continue
            by = f"{found.host} (process {found.pid})" if found and found.pid else found.host if found else by
            if decide(found, self._me, same_for_s=asked_at - sight.since, lives=self._lives) == "leave":
                return Hold(False, by)
            # Refused, it was another's write, or ours whose answer was lost: the next look tells.
            if self._store.replace(key, self._written(after=found.beat if found else 0), info.etag):
                return self._held(job)
        return Hold(False, by)

    def release(self, job: str) -> None:
        """Take a job's claim away if it is this farm's. Raises StoreError."""
        self._sights.pop(job, None)
        if not self._conditional():
            return
        try:
            found = self._found(_key(job))
        except ObjectMissingError:
            return
        # Between the look and this, nobody takes a claim that was renewed of late; who did makes another.
        if found is not None and found.farm == self._me.farm:
            self._store.delete(_key(job))

    def _conditional(self) -> bool:
        with self._probing:
            if self._enforced is None:
                self._enforced = self._store.probe().conditional_replace
                if not self._enforced:
                    _log.warning(
                        "no conditional replaces: two farms on this store may render the same shards",
                        extra={"store": self._store.url},
                    )
            return self._enforced

    def _found(self, key: str) -> Claim | None:
        data = self._store.get(key)
        try:
            return Claim.model_validate_json(data)
        except (NewerVersionError, ValidationError) as exc:
            # A newer farm's, as like as not: that it changes is all that has to be seen of it.
            _log.warning("claim not understood", extra={"key": key, "reason": str(exc).splitlines()[0]})
            return None

    def _written(self, *, after: int) -> bytes:
        return self._me.model_copy(update={"beat": after + 1}).model_dump_json().encode()

    def _held(self, job: str) -> Hold:
        self._sights.pop(job, None)
        return Hold(True)


def claim_of(farm: str, *, pid: int = 0) -> Claim:
    """Return a farm's claim as this machine makes it; `pid`: the process here that the farm ends with, 0 for none."""
    return Claim(
        farm=farm, host=socket.gethostname(), machine=_machine(), pid=pid, started=(_started(pid) or 0) if pid else 0
    )


def process_lives(pid: int, started: int) -> bool:
    """Whether the process of this machine that had `pid` and began at `started` still runs."""
    return _started(pid) == started


def _key(job: str) -> str:
    return f"claims/{job}"


def _machine() -> str:
    """Where process ids mean what they mean here: this boot of this machine, this container. Empty where nobody knows."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks after boot, which no step of the clock changes; None where none runs."""
    try:
        # What the process calls itself stands in brackets, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
