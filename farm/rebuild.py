"""Read a job from the ledger as a dispatcher needs to know it: what is done, what was said, what limits it.

Blocks on the store; the caller runs it in a thread. A read costs a few objects and one listing of receipts for each open
pass; the receipts themselves are read only where a GPU-hours budget has to know what they took, and where an image
failed. A receipt that does not parse counts by its presence: its shard is done, and finalising says what is wrong.
"""

import logging
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farm.bitmap import Bitmap
from farm.errors import ObjectMissingError, RecordError
from farm.lease import Check, Completion, Lease
from farm.ledger import Ledger
from farm.limits import limits_of
from farm.modelcard import merged
from farm.plan import Plan
from farm.prefetch import in_order
from farm.receipt import Receipt
from farm.records import device_seconds, standing
from farm.run import JobView, RunEntry

log = logging.getLogger(__name__)


def read_job(ledger: Ledger, job: str, *, threads: int = 8) -> JobView:
    """Read a job, open the pass that follows an approved pilot, and take the job's mark away when all is done.

    A job without a plan counts as deleted. Raises RecordError, NewerVersionError where a plan, a control or a pass cannot
    be read: the job is left as it is then.
    """
    plans = ledger.plans(job)
    if not plans:
        return JobView(job, state="deleted")
    said = standing(ledger.controls(job))
    limits = limits_of(plans[0].manifest, said)
    latest = [_latest(ledger, plan, approved=said.approved) for plan in plans]
    runs = tuple(_entry(ledger, one, one.done, threads) for one in latest if one.done is not None)
    waits = any(one.waits for one in latest)
    if not runs and not waits:
        _close(ledger, job)
    limited = limits.max_images is not None or limits.gpu_hours is not None
    return JobView(
        job=job,
        owner=plans[0].owner,
        priority=limits.priority,
        state=said.state,
        awaits_approval=waits,
        max_images=limits.max_images,
        max_gpu_s=None if limits.gpu_hours is None else limits.gpu_hours * 3600,
        finish_by=limits.finish_by_s,
        images_before=sum(_images(ledger, one) for one in latest) if limited else 0,
        gpu_s_before=sum(_gpu_s(ledger, one, threads) for one in latest) if limits.gpu_hours is not None else 0.0,
        runs=runs,
    )


def completion_of(ledger: Ledger, check: Check) -> Completion | None:
    """Return what a shard's receipt tells, as its renderer would have told it; None where there is none.

    One that does not parse is a receipt all the same: nothing is known of its rows then.
    """
    plan = next((plan for plan in ledger.plans(check.job) if plan.run == check.run), None)
    if plan is None:
        return None
    images = len(ledger.shard_indexes(plan, check.pass_number, check.shard))
    try:
        receipt = ledger.receipt(plan, check.pass_number, check.shard)
    except ObjectMissingError:
        return None
    except RecordError as exc:
        log.error("receipt not read", extra={"job": check.job, "shard": check.shard, "reason": exc.message})
        return Completion(_lease(check, images, attempt=1), renderer="", ok=images, failed=0)
    return Completion(
        _lease(check, images, attempt=receipt.attempt),
        renderer=receipt.renderer,
        ok=len(receipt.rows) - receipt.failed,
        failed=receipt.failed,
        seconds=dict(receipt.seconds),
    )


# Inside


@dataclass(frozen=True, slots=True)
class _Latest:
    """A run's latest pass. `done`: its shards with receipts, None where it is closed. `waits`: a pilot for approval."""

    plan: Plan
    number: int
    done: NDArray[np.bool_] | None
    waits: bool


def _latest(ledger: Ledger, plan: Plan, *, approved: bool) -> _Latest:
    number = ledger.passes(plan)
    closed = ledger.closed(plan, number)
    left_out = closed and ledger.covered(plan, number) < plan.images
    if left_out and approved:
        ledger.open_pass(plan, number + 1, None)
        number, closed, left_out = number + 1, False, False
    return _Latest(plan, number, None if closed else ledger.done_shards(plan, number), left_out)


def _close(ledger: Ledger, job: str) -> None:
    """Take the mark away, and put it back where a pass or a run was opened since the job was looked at."""
    ledger.close(job)
    if not all(ledger.finished(plan) for plan in ledger.plans(job)):
        ledger.open(job)


def _entry(ledger: Ledger, latest: _Latest, done: NDArray[np.bool_], threads: int) -> RunEntry:
    plan, number = latest.plan, latest.number
    failed = sum(
        receipt.failed for receipt in _receipts(ledger, latest, ledger.failed_shards(plan, number, done), threads)
    )
    return RunEntry(
        job=plan.job,
        run=plan.run,
        model=plan.card.name,
        pass_number=number,
        images=ledger.pass_images(plan, number),
        shard_images=plan.pass_shard_images(number),
        created_at=plan.created_at,
        done=Bitmap.of(done),
        failed=failed,
        seconds_per_image=_seconds_per_image(ledger, plan),
    )


def _seconds_per_image(ledger: Ledger, plan: Plan) -> float | None:
    """How long an image takes by what was measured last of this model, on whichever device; else as it was planned."""
    profiles = ledger.profiles(plan.card.name, plan.card.accelerated_on(plan.numerics.device))
    if not profiles:
        return plan.estimated_seconds_per_image
    last = max(profiles, key=lambda profile: profile.measured_at)
    return statistics.fmean(last.seconds_of(merged(plan.params, point)) for point in plan.sweep)


def _images(ledger: Ledger, latest: _Latest) -> int:
    """How many images the receipts of all passes have."""
    plan, number, done = latest.plan, latest.number, latest.done
    before = sum(ledger.pass_images(plan, one) for one in range(1, number))
    return before + (ledger.pass_images(plan, number) if done is None else ledger.rendered(plan, number, done))


def _gpu_s(ledger: Ledger, latest: _Latest, threads: int) -> float:
    """How long devices were occupied for all passes: closed ones by their totals, the open one by its receipts."""
    plan, number, done = latest.plan, latest.number, latest.done
    closed = number if done is None else number - 1
    totals = ledger.totals(plan, closed) if closed else None
    seconds = device_seconds(totals.seconds) if totals else 0.0
    if done is None:
        return seconds
    shards = (int(shard) for shard in np.flatnonzero(done))
    return seconds + sum(device_seconds(receipt.seconds) for receipt in _receipts(ledger, latest, shards, threads))


def _receipts(ledger: Ledger, latest: _Latest, shards: Iterable[int], threads: int) -> Iterable[Receipt]:
    """Read receipts in parallel; those that do not parse are logged and left out."""

    def read(shard: int) -> Receipt | None:
        try:
            return ledger.receipt(latest.plan, latest.number, shard)
        except (RecordError, ObjectMissingError) as exc:
            log.error("receipt not read", extra={"job": latest.plan.job, "shard": shard, "reason": exc.message})
            return None

    return (receipt for receipt in in_order(read, shards, threads=threads) if receipt is not None)


def _lease(check: Check, images: int, *, attempt: int) -> Lease:
    """The lease that ended with a receipt; its token is not known any more."""
    return Lease(
        token="",
        task="render",
        job=check.job,
        run=check.run,
        pass_number=check.pass_number,
        shard=check.shard,
        images=images,
        attempt=attempt,
    )
