"""Whether a renderer is stuck: a lease of its own on which nothing progressed for longer than its stage may take.

A hung call into a driver neither returns nor raises, and may leave every other thread running, heartbeats too. So the
renderer watches itself, and ends its own process. Knows no threads and no clock: it is shown the leases every second or so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from farm.lease import STAGE_LIMIT_S, Report, Stage

LATE_S = 5.0
"""A look this late means that the whole process stood still (stopped, suspended): time in which nothing could progress."""


@dataclass(slots=True)
class _Seen:
    stage: Stage
    ticks: int
    since: float


class Watchdog:
    """Remembers when each lease last progressed. `limits`: seconds that each stage may stand still."""

    def __init__(self, limits: Mapping[Stage, float] = STAGE_LIMIT_S):
        self._limits = limits
        self._seen: dict[str, _Seen] = {}
        self._looked_at: float | None = None
        self._was_late = False

    def look(self, reports: Iterable[Report], *, now: float) -> Report | None:
        """Return the report of a lease that is stuck, or None; `now`: monotonic seconds."""
        late = now - self._looked_at if self._looked_at is not None else 0.0
        self._looked_at = now
        # One look that is late forgives the time; looks that are always late are a machine's pace, and forgive none.
        forgiven, self._was_late = late > LATE_S and not self._was_late, late > LATE_S
        seen: dict[str, _Seen] = {}
        reports = tuple(reports)
        for report in reports:
            before = self._seen.get(report.token)
            if before is None or (before.stage, before.ticks) != (report.stage, report.ticks):
                before = _Seen(report.stage, report.ticks, now)
            elif forgiven:
                before.since += late
            seen[report.token] = before
        self._seen = seen
        # Who waits for the device is not stuck while others get on there.
        latest = max((one.since for one in seen.values()), default=now)
        for report in reports:
            since = latest if report.stage == "waiting" else seen[report.token].since
            if now - since > self._limits[report.stage]:
                return report
        return None
