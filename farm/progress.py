"""A job's snapshot for people, from what the dispatcher holds."""

from collections.abc import Collection, Mapping

from farm.held import Held, Renderer
from farm.run import JobProgress, JobState, RunState


def images_done(run: RunState, leases: Mapping[str, Held]) -> float:
    """Images of a pass that are done, and of shards in hand as many as their steps make up."""
    done = float(run.done_images)
    for holders in run.held.values():
        held = leases[holders[0].token]
        done += held.report.fraction * held.lease.images if held.report else 0.0
    return done


def snapshot(job: JobState, renderers: Collection[Renderer], leases: Mapping[str, Held]) -> JobProgress:
    """Show the job's open pass: of its oldest run that is not finalised, or of its newest."""
    runs = sorted(job.runs.values(), key=lambda run: run.entry.created_at)
    run = next((one for one in runs if not one.finalised), runs[-1] if runs else None)
    state, message = _state(job, run)
    if run is None:
        return _without_runs(job, state, renderers)
    if state == "waiting" and message is None:
        ahead = sorted({held.lease.job for held in leases.values()} - {job.view.job})
        message = f"waits behind {', '.join(ahead)}" if ahead else None
    done = images_done(run, leases)
    rate = None
    if len(run.samples) >= 2 and run.samples[-1][0] > run.samples[0][0]:
        rate = max(0.0, (run.samples[-1][1] - run.samples[0][1]) / (run.samples[-1][0] - run.samples[0][0]))
    entry = run.entry
    return JobProgress(
        job=entry.job,
        run=entry.run,
        pass_number=entry.pass_number,
        state=state,
        images=entry.images,
        done=run.done_images,
        failed=run.failed,
        fraction=done / entry.images if entry.images else 1.0,
        images_per_s=rate or None,
        eta_s=(entry.images - done) / rate if rate else None,
        renderers=len(renderers),
        renderers_busy=sum(bool(one.held) for one in renderers),
        message=message,
        seconds=dict(run.seconds),
    )


def _state(job: JobState, run: RunState | None) -> tuple[str, str | None]:
    """One word for people, and what they should know besides."""
    if job.view.state == "deleted":
        return "deleted", None
    if job.reading:
        return "finalising" if run is not None and run.finalised else "waiting", None
    if run is None or run.finalised:
        return ("pilot", "its pilot waits for approval") if job.view.awaits_approval else ("done", None)
    if job.view.state != "open":
        return job.view.state, None
    if run.stalled:
        return "stalled", run.message
    if job.limit and not run.held and not run.rendered:
        return "stopped", job.limit
    if not job.claimed:
        if job.elsewhere:
            return "elsewhere", f"rendered by another farm, {job.elsewhere}"
        return "waiting", "its claim is being asked for"
    if run.rendered:
        waits = None if run.finaliser else "its dataset waits for a renderer to write it"
        return "finalising", run.message or waits
    if run.held:
        return "running", run.message
    return "waiting", run.message


def _without_runs(job: JobState, state: str, renderers: Collection[Renderer]) -> JobProgress:
    busy = sum(bool(one.held) for one in renderers)
    return JobProgress(job.view.job, "", 0, state, 0, 0, 0, 1.0, None, None, len(renderers), busy, None, {})
