"""What a renderer without work may take over from busy ones, so that a job's last shards wait for nobody.

A lease that has not begun behind a long one is asked back. A shard that its renderer is far slower with than another
would be is given out a second time, as a twin: whichever receipt is first counts, and the other's pictures are orphans.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from farm.held import Held, Renderer
from farm.run import JobState, RunState

REVOKE_WORTH_S = 5.0
"""How long a lease must still wait for its turn before it is worth moving to an idle renderer."""
TWIN_WORTH = 2.0
"""How many times longer than a fresh start a shard must still need before it gets a twin."""
TWIN_WORTH_S = 10.0
"""And how many seconds more."""
NO_PROGRESS_S = 30.0
"""Without progress for this long, and longer than a whole shard takes, a lease is taken to need for ever."""


@dataclass(frozen=True, slots=True)
class TwinOffer:
    """A lease that may get a twin, and how many seconds it still needs."""

    token: str
    run: str
    shard: int
    remaining_s: float

    def pays(self, seconds: float) -> bool:
        """Whether to start anew on a renderer that would need so many seconds."""
        return self.remaining_s > TWIN_WORTH * seconds + TWIN_WORTH_S


def needs_s(held: Held, run: RunState | None, *, now: float) -> float | None:
    """Seconds that a lease that has begun still needs, by its own pace; for ever where it stands still. None: unknown."""
    report = held.report
    if report is None or run is None or run.speed is None or report.stage == "load":
        return None
    expected = run.expected_s(held.lease.images)
    if now - held.progressed_at > max(NO_PROGRESS_S, expected):
        return math.inf
    paced = held.remaining_s(now)
    return expected if paced is None else paced


def hangs(renderer: Renderer) -> bool:
    """Whether a renderer reports on something that makes no progress, so that what it is given besides would wait.

    Nothing hangs while urgent images get on, nor what waits for its turn or for them while a model is loaded.
    """
    begun = any(held.has_begun for held in renderer.held.values())
    loading = renderer.standing is not None and renderer.standing.loading
    return any(
        held.report is not None
        and (held.report.stage in ("encode", "denoise", "decode") or (held.report.stage == "waiting" and not begun))
        and not (loading and (held.report.stage == "waiting" or held.report.aside))
        and held.reported_at - max(held.progressed_at, renderer.urgent_at) > NO_PROGRESS_S
        for held in renderer.held.values()
    )


def unstarted(renderers: Iterable[Renderer], runs: Mapping[str, RunState], *, now: float) -> list[tuple[float, Held]]:
    """Leases that wait behind another on their renderer, and for how many seconds yet; the longest first."""
    found: list[tuple[float, Held]] = []
    for renderer in renderers:
        if all(held.has_begun for held in renderer.held.values()):
            continue
        begun = [held for held in renderer.held.values() if held.has_begun]
        ahead = max((needs_s(held, runs.get(held.lease.run), now=now) or 0.0 for held in begun), default=0.0)
        if not begun and hangs(renderer):
            ahead = math.inf  # behind something that was dropped and has not let go of the device
        if ahead > REVOKE_WORTH_S:
            found += [(ahead, held) for held in renderer.held.values() if held.report and not held.has_begun]
    return sorted(found, key=lambda one: -one[0])


def twin_offers(
    leases: Iterable[Held], jobs: Mapping[str, JobState], runs: Mapping[str, RunState], *, now: float
) -> list[TwinOffer]:
    """Leases that a renderer with the model would be done with far sooner, by how long they still need, the longest first.

    None of a job with a budget of GPU time, nor of a run whose speed is not known: nothing tells that it is slow.
    """
    offers = []
    for held in leases:
        lease = held.lease
        job, run = jobs.get(lease.job), runs.get(lease.run)
        if lease.task != "render" or not held.has_begun or job is None or run is None:
            continue
        if not job.is_open or job.view.max_gpu_s is not None or len(run.held.get(lease.shard, ())) != 1:
            continue
        remaining = needs_s(held, run, now=now)
        offer = TwinOffer(lease.token, lease.run, lease.shard, remaining or 0.0)
        if offer.pays(run.expected_s(lease.images)):
            offers.append(offer)
    return sorted(offers, key=lambda one: -one.remaining_s)
