"""Leases that are given out: who holds them, when they were last heard of, what of their time is charged.

Owns the renderers that are known, too. Bookkeeping alone, without rules.
"""

from dataclasses import dataclass, field

from farm.devices import DeviceInfo
from farm.lease import Lease, Report, Standing
from farm.records import DEVICE_STAGES
from farm.retry import Trouble


@dataclass(slots=True)
class Held:
    """A lease given out, and when it was last reported and last showed progress.

    `expected_s`: device seconds that are reckoned with for its owner; `charged_s`: those that were measured so far, by
    reports up to `charged_at`, which is None while it does not occupy the device. `attached`: its run is known, and it is
    counted there.
    """

    lease: Lease
    renderer: str
    reported_at: float
    progressed_at: float
    owner: str = ""
    expected_s: float = 0.0
    charged_s: float = 0.0
    charged_at: float | None = None
    began_at: float | None = None
    report: Report | None = None
    ask_back_at: float = 0.0
    attached: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether its renderer has said that it works on it."""
        return self.report is not None and self.report.stage != "waiting"

    def heard(self, report: Report, now: float) -> float:
        """Take in a report; returns device seconds to charge since the one before, those of urgent images left out.

        They may be less than none, where urgent images are counted later than the time passed.
        """
        before = self.report
        self.reported_at = now
        if before is None or report.ticks > before.ticks or report.stage != before.stage:
            self.progressed_at = now
        self.report = report
        seconds = 0.0
        if before is not None and self.charged_at is not None:
            seconds = now - self.charged_at - max(report.aside_s - before.aside_s, 0.0)
        self.charged_s += seconds
        self.charged_at = now if report.stage in DEVICE_STAGES else None
        if self.began_at is None and self.charged_at is not None:
            self.began_at = now
        return seconds

    def remaining_s(self, now: float) -> float | None:
        """Seconds that it still needs by its own pace; None before there is one."""
        if self.report is None or self.began_at is None or self.report.fraction <= 0:
            return None
        took = max(self.progressed_at - self.began_at, 0.0)
        paced = took * (1 - self.report.fraction) / self.report.fraction
        return max(paced - (now - self.progressed_at), 0.0)


@dataclass(slots=True)
class Renderer:
    """A renderer that said hello. `held` by token; `serves`: the owner of its latest lease, while it holds any.

    `sequence` is that of the question answered last, `asked` the newest seen. `asked_at`: when it last asked or held
    something. `troubles`: its failures by task (`board.task`). `standing`: what it said last of itself, None where it says
    nothing of the kind. `urgent_at`: when its urgent images last showed progress. `machine`: what its node renders on.
    """

    name: str
    incarnation: str
    device: str
    heard_at: float
    asked_at: float
    sequence: int = -1
    asked: int = -1
    answered: Lease | None = None
    loaded: str | None = None
    serves: str | None = None
    troubles: dict[str, Trouble] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    standing: Standing | None = None
    urgent_at: float = 0.0
    machine: DeviceInfo | None = None
