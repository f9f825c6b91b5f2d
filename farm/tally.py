"""What a process has counted, as a record that it can send; and how those of many processes become one view.

A snapshot is cumulative since its process (`incarnation`) began, so that one that is lost or late costs nothing.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

SILENT_S = 30.0
"""A process that has sent nothing for this long counts as gone: what it measured last is true no more."""
FORGOTTEN_S = 600.0
"""And after this long it counts as ended, though nobody said so."""
PAST_KEPT = 64
"""Processes that are gone and whose numbers are still kept apart, in case that they were only cut off."""

Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]


@dataclass(frozen=True, slots=True)
class Sample:
    """One number: a metric's name as Prometheus shows it (`_bucket`, `_sum` and `_count` for histograms) and its labels."""

    name: str
    labels: Labels
    value: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one process has counted. `process` is its lasting name (`renderer-3`), `incarnation` this life of it.

    `began_at`: when this life began, Unix seconds; 0 where it does not matter.
    """

    process: str
    incarnation: str
    samples: tuple[Sample, ...]
    began_at: float = 0.0


@dataclass(slots=True)
class _Life:
    """One incarnation's numbers. `base`: what its counters stood at when they were first seen."""

    base: dict[Key, float]
    counters: dict[Key, float]
    gauges: dict[Key, float]
    heard_at: float

    def hear(self, counters: dict[Key, float], gauges: dict[Key, float], now: float) -> None:
        for key, value in counters.items():
            # The greater counts, so that a snapshot that was overtaken by a later one takes nothing back.
            self.counters[key] = max(self.counters.get(key, 0.0), value)
        self.gauges, self.heard_at = gauges, now


class Tallies:
    """The sum of what many processes counted: counters never fall when one ends, gauges are of those that live.

    `began_at`: since when this sum is kept, Unix seconds. Of a process that is older, only what it counts from its first
    snapshot on is added: the sum before it died with the process that kept it, and Prometheus, which sees this one begin
    at 0, would count everything a second time. `now` is monotonic seconds.
    """

    def __init__(self, *, began_at: float = 0.0):
        self._began_at = began_at
        self._current: dict[str, str] = {}
        self._lives: OrderedDict[tuple[str, str], _Life] = OrderedDict()
        self._past: dict[Key, float] = {}
        self._closed: set[tuple[str, str]] = set()

    def put(self, snapshot: Snapshot, *, now: float) -> None:
        """Take in a snapshot; again, late or out of order changes nothing that it should not."""
        name = (snapshot.process, snapshot.incarnation)
        if name in self._closed:
            return
        counters = {(s.name, s.labels): s.value for s in snapshot.samples if _only_grows(s.name)}
        gauges = {(s.name, s.labels): s.value for s in snapshot.samples if not _only_grows(s.name)}
        life = self._lives.get(name)
        if life is None:
            for silent in [one for one in self._current if now - self._heard_at(one) > FORGOTTEN_S]:
                self.gone(silent)
            is_older = 0.0 < snapshot.began_at < self._began_at
            life = self._lives[name] = _Life(dict(counters) if is_older else {}, {}, {}, now)
            self._current[snapshot.process] = snapshot.incarnation
        self._current.setdefault(snapshot.process, snapshot.incarnation)
        life.hear(counters, gauges, now)
        self._lives.move_to_end(name)
        while len(self._lives) > len(self._current) + PAST_KEPT:
            self._close(next(one for one in self._lives if self._current.get(one[0]) != one[1]))

    def gone(self, process: str) -> None:
        """A process ended: its gauges go at once, its counters stay."""
        incarnation = self._current.pop(process, None)
        if incarnation is not None:
            self._lives[process, incarnation].gauges = {}

    def samples(self, *, now: float) -> tuple[Sample, ...]:
        """Return the sums."""
        sums = dict(self._past)
        for (process, incarnation), life in self._lives.items():
            for key, value in life.counters.items():
                sums[key] = sums.get(key, 0.0) + value - life.base.get(key, 0.0)
            if self._current.get(process) == incarnation and now - life.heard_at <= SILENT_S:
                for key, value in life.gauges.items():
                    sums[key] = sums.get(key, 0.0) + value
        return tuple(Sample(name, labels, value) for (name, labels), value in sums.items())

    def _heard_at(self, process: str) -> float:
        return self._lives[process, self._current[process]].heard_at

    def _close(self, name: tuple[str, str]) -> None:
        """Add a life that is over to the past, for good."""
        life = self._lives.pop(name)
        for key, value in life.counters.items():
            self._past[key] = self._past.get(key, 0.0) + value - life.base.get(key, 0.0)
        self._closed.add(name)


def added(snapshots: Iterable[Snapshot]) -> dict[Key, float]:
    """Return the sums over processes, by name and labels."""
    sums: dict[Key, float] = {}
    for snapshot in snapshots:
        for sample in snapshot.samples:
            key = (sample.name, sample.labels)
            sums[key] = sums.get(key, 0.0) + sample.value
    return sums


def _only_grows(name: str) -> bool:
    """Whether a sample belongs to a counter or a histogram, by the suffix that Prometheus demands of those."""
    return name.endswith(("_total", "_bucket", "_sum", "_count"))
