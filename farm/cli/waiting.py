"""What keeps a job from going on until a person has spoken, and the command that lets it: a pause, a pilot, a limit."""

import sys
from typing import TYPE_CHECKING

import typer

from farm.cli.moment import now_iso, whoami
from farm.cli.options import Options
from farm.cli.summary import summarise_pilot
from farm.cli.terminal import note
from farm.cli.wording import age, count, printable
from farm.errors import CancelledError, FarmError, WaitingError

if TYPE_CHECKING:
    from farm.ledger import Ledger
    from farm.limits import Limits
    from farm.run import JobProgress
    from farm.status import State

_RAISES = {"finish_by": "--finish-by T", "GPU-hours": "--gpu-hours H", "images": "--max-images N"}
"""A word of the reason why a job stopped by itself -> the flag of `farm change` that lets it go on."""


def begin(options: Options, ledger: "Ledger", job: str, *, again: str, yes: bool) -> "State":
    """See to what holds a job back before a farm is started for it; returns how the job stands then.

    A cancelled job is resumed, and the pilot's other images offered. Raises WaitingError for a paused job, and for one whose
    `finish_by` has passed; `again` is the command that renders it.
    """
    from farm.controls import resume

    state = _state(ledger, job)
    if state == "cancelled":
        resume(ledger, job, at=now_iso(), by=whoami())
        note(f"{job} was cancelled; it goes on")
        state = _state(ledger, job)
    if state == "paused":
        raise WaitingError(f"{job} is paused{_by(ledger, job)}; go on with it: farm resume {job}, then {again}")
    if state == "pilot":
        return offer_others(options, ledger, job, again=again, yes=yes)
    limits = _limits(ledger, job)
    left = limits.seconds_left(now_iso())
    if state == "open" and left is not None and left <= 0:
        raise WaitingError(
            f"{job} stopped: its finish_by {limits.finish_by} has passed; give it a later one: "
            f"farm change {job} --finish-by T, then farm retry {job}"
        )
    return state


def offer_others(options: Options, ledger: "Ledger", job: str, *, again: str, yes: bool) -> "State":
    """Show a finished pilot and ask whether the images that it left out should follow; returns how the job stands then.

    `yes` approves without asking; where nobody can be asked, the job waits.
    """
    from farm.controls import approve
    from farm.status import awaits_approval

    state = _state(ledger, job)
    if state != "pilot":
        return state
    if not (yes and options.json):  # else one JSON value follows, of the whole job
        summarise_pilot(options, ledger, job)
    others = sum(plan.images - (plan.pilot or 0) for plan in ledger.plans(job) if awaits_approval(ledger, plan))
    if yes or agreed(options, f"Look at the sheet. Render the other {count(others, 'image')}?"):
        note(approve(ledger, job, at=now_iso(), by=whoami()).message)
        return _state(ledger, job)
    note(f"look at the pilot's sheet; the other {count(others, 'image')} follow with: farm approve {job}, then {again}")
    return "pilot"


def held_up(ledger: "Ledger", last: "JobProgress", *, again: str) -> FarmError | None:
    """Return what a followed job was stopped by, as the error that says how to go on; None where it was not."""
    job = last.job
    match last.state:
        case "cancelled":
            return CancelledError(f"{job} was cancelled with {_rendered(ledger, job)}; go on with it: {again}")
        case "deleted":
            return CancelledError(
                f"{job} was deleted; what was rendered of it is swept, and nothing is left to go on with"
            )
        case "paused":
            who = _by(ledger, job)
            return WaitingError(
                f"{job} is paused{who}, with {_rendered(ledger, job)}; go on with it: farm resume {job}, then {again}"
            )
        case "stopped":
            why = last.message or "a limit is reached"
            flag = next((flag for word, flag in _RAISES.items() if word in why), "--help")
            return WaitingError(f"{job} stopped: {why}; raise it: farm change {job} {flag}, then farm retry {job}")
    return None


def agreed(options: Options, question: str) -> bool:
    """Ask a person on a terminal; nobody there means no."""
    if options.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False


def _state(ledger: "Ledger", job: str) -> "State":
    from farm.records import standing
    from farm.status import state_of

    ledger.plan(job)  # one that is being deleted has none
    return state_of(ledger, ledger.plans(job), standing(ledger.controls(job)))


def _limits(ledger: "Ledger", job: str) -> "Limits":
    from farm.limits import limits_of
    from farm.records import standing

    ledger.plan(job)
    return limits_of(ledger.plans(job)[0].manifest, standing(ledger.controls(job)))


def _rendered(ledger: "Ledger", job: str) -> str:
    """How much of a job is stored, `4 of 10 images`."""
    from farm.status import images_done

    plans = ledger.plans(job)
    done = sum(images_done(ledger, plan) for plan in plans)
    return f"{done:,} of {count(sum(plan.images for plan in plans), 'image')}"


def _by(ledger: "Ledger", job: str) -> str:
    """Who paused a job and when, to stand behind `is paused`."""
    said = [control for control in ledger.controls(job) if control.action == "pause"]
    return f" (by {printable(said[-1].by)}, {age(said[-1].at)} ago)" if said else ""
