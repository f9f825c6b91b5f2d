"""A job and its runs' open passes as the dispatcher holds them: which shards wait, which are held, what stops them.

Bookkeeping alone: who gets a shard, and what follows a failure, is decided in `farm/dispatch.py`.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from farm.bitmap import Bitmap
from farm.lease import Lease
from farm.retry import Blame

FINALISE = -1
"""The shard number of the task that follows a pass's last receipt."""
UNKNOWN_SHARD_S = 60.0
"""What a shard is taken to need on a device before one of its run was measured."""
SPEED_MEMORY = 0.3
"""Weight of the newest shard in a run's mean speed."""


@dataclass(frozen=True, slots=True)
class RunEntry:
    """One run's open pass, as read from the ledger. `done[s]`: shard `s` has a receipt."""

    job: str
    run: str
    model: str
    pass_number: int
    images: int
    shard_images: int
    created_at: str
    done: Bitmap
    failed: int = 0
    seconds_per_image: float | None = None


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as read from the ledger: what was said to it, and each of its runs' open pass.

    `runs` is empty where every pass is closed: the job is done, or a closed pilot `awaits_approval`. `max_images`,
    `max_gpu_s` and `finish_by` (Unix seconds) limit the whole job. `images_before` and `gpu_s_before`: what its receipts
    come to, those of closed passes too; read only where there is such a limit, else 0.
    """

    job: str
    owner: str = ""
    priority: int = 50
    state: Literal["open", "paused", "cancelled", "deleted"] = "open"
    awaits_approval: bool = False
    max_images: int | None = None
    max_gpu_s: float | None = None
    finish_by: float | None = None
    images_before: int = 0
    gpu_s_before: float = 0.0
    runs: tuple[RunEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class JobProgress:
    """A snapshot of a job's open pass. `fraction` counts the steps of shards in hand; `images_per_s` is of late.

    `renderers` and `renderers_busy` are the farm's, for whichever job.
    """

    job: str
    run: str
    pass_number: int
    state: str
    images: int
    done: int
    failed: int
    fraction: float
    images_per_s: float | None
    eta_s: float | None
    renderers: int
    renderers_busy: int
    message: str | None
    seconds: dict[str, float]


@dataclass(slots=True)
class JobState:
    """What is known of a job besides its runs. `claimed`: whether this farm may lease it, None while that is being found
    out; `elsewhere` says who else does.

    `reading`: it is being read from the ledger, and nothing of it is leased until then. `images`, `gpu_s`: rendered and
    spent so far; `images_held` those in hand.
    """

    view: JobView
    runs: dict[str, "RunState"] = field(default_factory=dict)
    claimed: bool | None = True
    elsewhere: str = ""
    reading: bool = False
    images: int = 0
    images_held: int = 0
    gpu_s: float = 0.0
    gpu_expected_s: float = 0.0
    limit: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, by the farm or by a person."""
        return not (self.reading or self.view.awaits_approval) and all(run.finalised for run in self.runs.values())

    @property
    def is_open(self) -> bool:
        """Whether something of it may be leased as far as people and claims have a say."""
        return self.view.state == "open" and self.claimed is True and not self.reading

    def over(self, images: int, seconds: float | None, wall: float) -> str | None:
        """Why a lease of so many images and device seconds (None: not known yet) cannot be given now, or None."""
        view = self.view
        if view.finish_by is not None and wall >= view.finish_by:
            return "its finish_by has passed"
        if view.max_images is not None and self.images + self.images_held + images > view.max_images:
            rendered = f"{self.images:,} of the {view.max_images:,} images of its budget"
            return f"{rendered} are rendered, and the next shard has {images:,}"
        if view.max_gpu_s is not None:
            if seconds is None and self.images_held:
                return "its first shard is being measured against its budget"
            if self.gpu_s >= view.max_gpu_s or self.gpu_s + self.gpu_expected_s + (seconds or 0.0) > view.max_gpu_s:
                spent, budget = self.gpu_s / 3600, view.max_gpu_s / 3600
                return (
                    f"{spent:.3g} of the {budget:.3g} GPU-hours of its budget are spent, and the next shard needs more"
                )
        return None


@dataclass(slots=True)
class RunState:
    """A run's open pass. `held`: shard -> its leases, two where it has a twin.

    A shard that was never leased lies at or after `cursor`; one that came back is `unsure` until it is known to have no
    receipt, then `returned`.
    """

    entry: RunEntry
    done: Bitmap = field(init=False)
    done_images: int = field(init=False)
    failed: int = field(init=False)
    cursor: int = 0
    returned: list[int] = field(default_factory=list)
    unsure: set[int] = field(default_factory=set)
    held: dict[int, list[Lease]] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    blame: dict[int, Blame] = field(default_factory=dict)
    finaliser: str | None = None
    finalised: bool = False
    stalled: tuple[str, str] | None = None
    message: str | None = None
    idle_deaths: int = 0
    idle_died_at: float = -math.inf
    finalise_deaths: int = 0
    refusal: tuple[str, str] | None = None
    speed: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    samples: deque[tuple[float, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.done = self.entry.done.copy()
        self.failed = self.entry.failed
        self.speed = self.entry.seconds_per_image
        self.done_images = self.done.count * self.entry.shard_images
        last = self.done.size - 1
        if last >= 0 and self.done[last]:
            self.done_images -= self.entry.shard_images - self.shard_size(last)

    def shard_size(self, shard: int) -> int:
        """Images in one shard: the last may be short."""
        start = shard * self.entry.shard_images
        return min(self.entry.shard_images, self.entry.images - start)

    def expected_s(self, images: int) -> float:
        """Seconds on a device that so many images are expected to take."""
        if self.speed is None:
            return UNKNOWN_SHARD_S * images / self.entry.shard_images
        return self.speed * images

    def measured(self, images: int, seconds: float) -> None:
        """Learn from a shard that took so many seconds on its device."""
        if images > 0 and seconds > 0:
            each = seconds / images
            self.speed = each if self.speed is None else self.speed + SPEED_MEMORY * (each - self.speed)

    @property
    def rendered(self) -> bool:
        """Whether every shard has its receipt."""
        return self.done.full

    def has_work(self) -> bool:
        """Whether something could be leased, as far as its shards have a say."""
        if self.finalised or self.stalled:
            return False
        if self.rendered:
            return self.finaliser is None
        self._advance()
        return bool(self.returned) or self.cursor < self.done.size

    def next_shard(self) -> int:
        """The next waiting shard, those that came back first. Call only after `has_work`; `take` takes it."""
        return self.returned[0] if self.returned else self.cursor

    def take(self, shard: int) -> None:
        """Let a shard wait no longer: it is leased."""
        if self.returned and self.returned[0] == shard:
            heapq.heappop(self.returned)
        elif self.cursor == shard:
            self.cursor += 1

    def came_back(self, shard: int) -> None:
        """Let a shard that is known to have no receipt wait again."""
        self.unsure.discard(shard)
        if not self.done[shard] and shard not in self.held and shard < self.cursor:
            heapq.heappush(self.returned, shard)

    def set_done(self, shard: int) -> bool:
        """Note a receipt; False where it was known."""
        if not self.done.set(shard):
            return False
        self.unsure.discard(shard)
        self.done_images += self.shard_size(shard)
        self.blame.pop(shard, None)
        self.attempts.pop(shard, None)
        return True

    def stall(self, code: str, message: str) -> None:
        """Stop until a person has acted."""
        self.stalled = (code, message)
        self.message = message

    def _advance(self) -> None:
        """Drop returned shards that somebody finished or holds, and move past done or held ones."""
        returned = self.returned
        while returned and (self.done[returned[0]] or returned[0] in self.held or returned[0] in self.unsure):
            heapq.heappop(returned)
        self.cursor = self.done.next_clear(self.cursor)
        while self.cursor < self.done.size and (self.cursor in self.held or self.cursor in self.unsure):
            self.cursor = self.done.next_clear(self.cursor + 1)


def may_keep(job: JobState, run: RunState, lease: Lease) -> bool:
    """Whether a renderer may keep a lease that this dispatcher has not given out: of an open pass, not done, not another's."""
    if job.view.state != "open" or job.claimed is False or run.finalised or lease.pass_number != run.entry.pass_number:
        return False
    if lease.task == "finalise":
        return run.finaliser is None
    if lease.shard >= run.done.size or run.done[lease.shard]:
        return False
    holders = run.held.get(lease.shard, [])
    return not holders or (len(holders) == 1 and lease.twin != holders[0].twin)
