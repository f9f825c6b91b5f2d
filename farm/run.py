"""One run's open pass as the dispatcher holds it: which shards wait, which are held, what stopped it.

Bookkeeping alone: who gets a shard, and what follows a failure, is decided in `farm/dispatch.py`.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farm.retry import Blame

FINALISE = -1
"""The shard number of the task that follows a pass's last receipt."""


@dataclass(frozen=True, slots=True)
class RunEntry:
    """One run's open pass, as read from the ledger. `done[s]`: shard `s` has a receipt."""

    job: str
    run: str
    model: str
    pass_number: int
    images: int
    shard_images: int
    priority: int
    created_at: str
    done: NDArray[np.bool_]
    failed: int = 0


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
class RunState:
    """What is known of a run besides its entry. `held`: shard -> token of its lease."""

    entry: RunEntry
    done: NDArray[np.bool_] = field(init=False)
    done_images: int = field(init=False)
    failed: int = field(init=False)
    cursor: int = 0
    returned: list[int] = field(default_factory=list)
    held: dict[int, str] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    blame: dict[int, Blame] = field(default_factory=dict)
    finaliser: str | None = None
    finalised: bool = False
    stopped: str | None = None
    stalled: tuple[str, str] | None = None
    message: str | None = None
    not_before: float = 0.0
    failures: int = 0
    failing_since: float = 0.0
    idle_deaths: int = 0
    finalise_deaths: int = 0
    unfit: tuple[str, str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    samples: deque[tuple[float, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.done = self.entry.done.copy()
        self.done_images = sum(self.shard_size(int(shard)) for shard in np.flatnonzero(self.done))
        self.failed = self.entry.failed

    def shard_size(self, shard: int) -> int:
        """Images in one shard: the last may be short."""
        start = shard * self.entry.shard_images
        return min(self.entry.shard_images, self.entry.images - start)

    @property
    def rendered(self) -> bool:
        """Whether every shard has its receipt."""
        return self.done_images >= self.entry.images

    @property
    def state(self) -> str:
        """One word for people."""
        if self.finalised:
            return "done"
        if self.stalled:
            return "stalled"
        if self.stopped:
            return self.stopped
        if self.rendered:
            return "finalising"
        return "running" if self.held else "waiting"

    def has_work(self) -> bool:
        """Whether something can be leased now."""
        if self.finalised or self.stopped or self.stalled:
            return False
        if self.rendered:
            return self.finaliser is None
        self._advance()
        return bool(self.returned) or self.cursor < len(self.done)

    def next_shard(self) -> int:
        """Take the next waiting shard, those that came back first. Call only after `has_work`."""
        if self.returned:
            return heapq.heappop(self.returned)
        self.cursor += 1
        return self.cursor - 1

    def stall(self, code: str, message: str) -> None:
        """Stop until a person has acted."""
        self.stalled = (code, message)
        self.message = message

    def _advance(self) -> None:
        """Drop returned shards that somebody finished meanwhile, and move past done or held ones."""
        while self.returned and (self.done[self.returned[0]] or self.returned[0] in self.held):
            heapq.heappop(self.returned)
        while self.cursor < len(self.done) and (self.done[self.cursor] or self.cursor in self.held):
            self.cursor += 1
