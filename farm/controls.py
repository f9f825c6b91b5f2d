"""What people may say to a job: pause, resume, cancel, approve, change, retry; checked, then written down.

The one place where it is decided whether something can be said to a job as it stands; the command line and the server
call it alike. What is written holds once a function returns, whether or not a farm is running; saying twice what stands
already writes nothing. Unknown jobs are UnknownJobError, jobs deleted meanwhile and words without effect ControlError.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from farm.errors import ControlError
from farm.ledger import Indexes, Ledger
from farm.limits import Changes, Limits, limits_of
from farm.moment import moment
from farm.plan import Plan
from farm.records import Action, Control, Standing, standing
from farm.status import State, state_of
from farm.verify import damaged_images

MAX_LISTED = 10_000_000
HOW_TO_LIST = "write indexes as 7,9,20-29"

Which = Literal["failed", "all"] | Sequence[int] | Indexes


@dataclass(frozen=True, slots=True)
class Said:
    """What was said to a job. `state`: how it stands now. `control`: None where it stood so before."""

    job: str
    state: State
    control: Control | None
    message: str


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry came to. `opened`: images that will be rendered again.

    `unfinished`: a run of the job is not done yet and goes on first. `resumed`: the job was paused or cancelled.
    """

    job: str
    opened: int
    unfinished: bool
    resumed: bool
    message: str


def pause(ledger: Ledger, job: str, *, at: str, by: str) -> Said:
    """Stop rendering until `resume`; what is stored stays."""
    found = _look(ledger, job)
    if found.state == "done":
        raise ControlError(f"{job} is done, {_images(found)}; there is nothing to pause")
    if found.state == "cancelled":
        raise ControlError(f"{job} is cancelled, so nothing of it is rendered; farm resume {job} goes on with it")
    if found.state == "paused":
        return Said(job, "paused", None, f"{job} was paused before")
    return found.say(ledger, "pause", f"{job} is paused; farm resume {job} goes on with it", at=at, by=by)


def resume(ledger: Ledger, job: str, *, at: str, by: str) -> Said:
    """Go on with a job that was paused or cancelled."""
    found = _look(ledger, job)
    if found.state == "done":
        raise ControlError(f"{job} is done, {_images(found)}; there is nothing to go on with")
    message = f"{job} goes on{_what_stops_it(found, at)}"
    ledger.open(job)
    if found.said.state == "open":
        return Said(job, found.state, None, f"{job} was neither paused nor cancelled{_what_stops_it(found, at)}")
    return found.say(ledger, "resume", message, at=at, by=by)


def cancel(ledger: Ledger, job: str, *, at: str, by: str) -> Said:
    """Stop a job for good, unless somebody resumes it; what is stored stays."""
    found = _look(ledger, job)
    if found.state == "done":
        raise ControlError(f"{job} is done, {_images(found)}; there is nothing to cancel")
    if found.state == "cancelled":
        return Said(job, "cancelled", None, f"{job} was cancelled before")
    return found.say(ledger, "cancel", f"{job} is cancelled; farm resume {job} goes on with it", at=at, by=by)


def approve(ledger: Ledger, job: str, *, at: str, by: str) -> Said:
    """Let the images follow that the job's pilot left out; may be said before the pilot is done."""
    found = _look(ledger, job)
    pilots = [plan for plan in found.plans if plan.pilot is not None]
    if not pilots:
        raise ControlError(
            f"{job} has no pilot, so there is nothing to approve; it renders all its images without asking"
        )
    if found.said.approved:
        return Said(job, found.state, None, f"{job} was approved before{_what_stops_it(found, at)}")
    if found.state == "done":
        raise ControlError(f"{job} is done, {_images(found)}; there is nothing to approve")
    others = sum(plan.images - (plan.pilot or 0) for plan in pilots)
    early = "" if found.state in ("pilot", "cancelled", "paused") else " when the pilot is done"
    ledger.open(job)
    message = f"{job} is approved; its other {_count(others)} follow{'s' if others == 1 else ''}{early}"
    return found.say(ledger, "approve", message + _what_holds_it(found), at=at, by=by)


def change(ledger: Ledger, job: str, changes: Changes, *, at: str, by: str) -> Said:
    """Change a job's priority or limits. Raises ControlError for a value that cannot be."""
    found = _look(ledger, job)
    _check(job, changes, at)
    if found.state == "done":
        raise ControlError(f"{job} is done, {_images(found)}; there is nothing to change")
    new = found.limits.differing(changes)
    if not new.given:
        return Said(job, found.state, None, f"{job} has these values already")
    ledger.open(job)
    message = f"{job}: {'; '.join(found.limits.words(new))}"
    return found.say(ledger, "change", message, at=at, by=by, changes=new)


def retry(
    ledger: Ledger,
    job: str,
    *,
    which: Which = "failed",
    damaged: bool = False,
    run: str | None = None,
    at: str,
    by: str,
) -> Retried:
    """Open a pass over images that are rendered again: those that failed, all, or listed ones of one run.

    `damaged` reads every picture and adds those that are missing or not as their rows say. A job that is paused or
    cancelled is resumed. One that is not done goes on first where failed images are asked for, and for other images is
    refused. Raises ControlError too for indexes out of range, and where another opens a pass of the job meanwhile; what was
    opened by then it names.
    """
    found = _look(ledger, job)
    plans = _runs(found, run, listed=not isinstance(which, str))
    done = [plan for plan in plans if ledger.finished(plan)]
    unfinished = len(done) < len(plans)
    failed = isinstance(which, str) and which == "failed"
    if not done and not failed:
        raise ControlError(f"{job} {_not_done(found)}; images of it can be rendered again when it is done")
    wanted = [(plan, _wanted(ledger, plan, which, damaged=damaged)) for plan in done]
    wanted = [(plan, indexes) for plan, indexes in wanted if indexes is None or len(indexes)]
    if not wanted and not unfinished:
        what = "failed or is damaged" if damaged else "failed"
        return Retried(job, 0, False, False, f"no image of {job} {what}; there is nothing to render again")
    opened = 0
    passes: list[str] = []
    for plan, indexes in wanted:
        ledger.open(job)
        try:
            number = _open(ledger, plan, indexes)
        except ControlError as exc:
            before = f". What was opened before stays open: {', '.join(passes)}" if passes else ""
            raise ControlError(exc.message + before) from exc
        images = plan.images if indexes is None else len(indexes)
        passes.append(f"pass {number} of run {plan.run}, {_count(images)}")
        opened += images
    # Once more: a farm that found the job done before the pass was open may have taken the mark away since.
    ledger.open(job)
    # As it stands now: to look for damaged pictures takes long, and somebody may have spoken meanwhile.
    resumed = standing(ledger.controls(job)).state != "open"
    if resumed:
        ledger.append_control(job, "resume", at=at, by=by, run=found.plans[0].run)
    message = f"{_count(opened, 'failed image' if failed and not damaged else 'image')} of {job} will be rendered again"
    if not opened:
        message = f"{job} {_not_done(found)}; it goes on, and failed images can be retried after it"
        if found.state == "pilot":
            message = f"{job} {_not_done(found)}; failed images can be retried when all the others are done too"
    return Retried(job, opened, unfinished, resumed, message)


def parse_indexes(text: str) -> Indexes:
    """Read `7,9,20-29`, ascending and each once. Raises ControlError."""
    found: list[Indexes] = []
    total = 0
    for part in text.split(","):
        first, dash, last = (one.strip() for one in part.partition("-"))
        last = last if dash else first
        if not all(one.isascii() and one.isdigit() and len(one) <= 15 for one in (first, last)):
            raise ControlError(f"{part.strip()!r} is no image index and no range of them; {HOW_TO_LIST}")
        if int(last) < int(first):
            raise ControlError(f"{part.strip()!r} ends before it begins; {HOW_TO_LIST}")
        total += int(last) - int(first) + 1
        if total > MAX_LISTED:
            raise ControlError(f"more than {MAX_LISTED:,} images are listed; retry all of them, or in several lists")
        found.append(np.arange(int(first), int(last) + 1, dtype=np.int64))
    return np.unique(np.concatenate(found))


# Inside


@dataclass(frozen=True, slots=True)
class _Job:
    job: str
    plans: list[Plan]
    said: Standing
    state: State
    limits: Limits

    def say(
        self, ledger: Ledger, action: Action, message: str, *, at: str, by: str, changes: Changes | None = None
    ) -> Said:
        given = (changes or Changes()).given
        control = ledger.append_control(self.job, action, at=at, by=by, run=self.plans[0].run, **given)
        said = standing([*ledger.controls(self.job)])
        return Said(self.job, state_of(ledger, self.plans, said), control, message)


def _look(ledger: Ledger, job: str) -> _Job:
    if ledger.deleted(job):
        raise ControlError(f"{job} is being deleted; run farm delete {job} again, which ends it")
    plans = ledger.plans(job) or [ledger.plan(job)]  # which raises, and names the nearest
    said = standing(ledger.controls(job))
    return _Job(job, plans, said, state_of(ledger, plans, said), limits_of(plans[0].manifest, said))


def _images(found: _Job) -> str:
    return _count(sum(plan.images for plan in found.plans))


def _count(images: int, kind: str = "image") -> str:
    return f"{images:,} {kind}{'s' if images != 1 else ''}"


def _what_stops_it(found: _Job, at: str) -> str:
    """Say why a job that nobody holds back would stop all the same, as the end of a sentence; empty where nothing does."""
    left = found.limits.seconds_left(at)
    if left is not None and left <= 0:
        return (
            f", but its finish_by {found.limits.finish_by} has passed: give it a later one with farm change {found.job}"
        )
    if any(plan.pilot for plan in found.plans) and not found.said.approved and found.state in ("pilot", "paused"):
        return f"; after its pilot it waits for farm approve {found.job}"
    return ""


def _what_holds_it(found: _Job) -> str:
    return "" if found.said.state == "open" else f", once farm resume {found.job} goes on: it is {found.said.state}"


def _not_done(found: _Job) -> str:
    if found.state == "pilot":
        return f"waits with its pilot done: farm approve {found.job} lets the other images follow"
    return "is not done yet"


def _check(job: str, changes: Changes, at: str) -> None:
    if not changes.given:
        raise ControlError(f"nothing to change of {job} is given; give a priority, finish_by, gpu_hours or images")
    if changes.priority is not None and not 0 <= changes.priority <= 100:
        raise ControlError(f"priority must be 0 to 100, got {changes.priority}; higher goes first")
    if changes.gpu_hours is not None and not (changes.gpu_hours > 0 and math.isfinite(changes.gpu_hours)):
        raise ControlError(f"gpu_hours must be above 0, got {changes.gpu_hours}; to stop the job: farm cancel {job}")
    if changes.max_images is not None and changes.max_images <= 0:
        raise ControlError(f"images must be above 0, got {changes.max_images}; to stop the job: farm cancel {job}")
    if changes.finish_by is not None:
        try:
            passed = moment(changes.finish_by) <= moment(at)
        except ValueError as exc:
            raise ControlError(f"finish_by {exc}") from exc
        if passed:
            raise ControlError(f"finish_by {changes.finish_by} has passed; give a later one, or farm cancel {job}")


def _runs(found: _Job, run: str | None, *, listed: bool) -> list[Plan]:
    names = [plan.run for plan in found.plans]
    if run is not None:
        if run not in names:
            raise ControlError(f"{found.job} has no run {run!r}; it has {', '.join(names)}")
        return [plan for plan in found.plans if plan.run == run]
    if listed and len(names) > 1:
        raise ControlError(
            f"{found.job} has {len(names)} runs, each with images from 0: say which is meant, of {', '.join(names)}"
        )
    return found.plans


def _open(ledger: Ledger, plan: Plan, indexes: Indexes | None) -> int:
    number = ledger.passes(plan) + 1
    if not ledger.open_pass(plan, number, indexes):
        raise ControlError(
            f"pass {number} of {plan.job} was just opened by somebody else; look at it: farm status {plan.job}"
        )
    return number


def _wanted(ledger: Ledger, plan: Plan, which: Which, *, damaged: bool) -> Indexes | None:
    """The images to render again; None for all."""
    if isinstance(which, str):
        if which == "all":
            return None
        wanted = ledger.failed_indexes(plan)
    else:
        try:
            wanted = np.unique(np.asarray(which, dtype=np.int64))
        except (OverflowError, TypeError, ValueError) as exc:
            raise ControlError(
                f"what is listed of {plan.job} are not its indexes, 0 to {plan.images - 1}; {HOW_TO_LIST}"
            ) from exc
        outside = wanted[(wanted < 0) | (wanted >= plan.images)]
        if not len(wanted):
            raise ControlError(f"no image of {plan.job} is listed; {HOW_TO_LIST}")
        if len(outside):
            raise ControlError(
                f"{plan.job} has no image {outside[0]}: its indexes are 0 to {plan.images - 1}; {HOW_TO_LIST}"
            )
    return np.union1d(wanted, damaged_images(ledger, plan)) if damaged else wanted
