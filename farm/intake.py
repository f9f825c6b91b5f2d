"""Take up a job as it was read from the ledger: what is new of it, what somebody else did, what must end.

What was read may be a moment old: what is known to be done stays so, and an older pass than the known one is passed over.
"""

from farm.board import Board
from farm.run import JobState, JobView, RunEntry, RunState, may_keep

JOBS_KEPT = 256
"""Jobs without work that progress can still be asked of."""


def take_up(
    board: Board, view: JobView, *, again: bool, again_soon: bool = False, claimed: bool | None, now: float
) -> None:
    """Know a job as it was just read. `again`: a person asks for it, and what had stalled is tried again. `claimed`: what
    holds for a job that was not known, as `JobState` has it."""
    job = board.jobs.get(view.job)
    if job is None or (job.view.state == "deleted" and view.state != "deleted"):
        job = board.jobs[view.job] = JobState(view, claimed=job.claimed if job else claimed)
    resumed = job.view.state != view.state
    job.view, job.reading = view, job.reading and again_soon
    entries = {entry.run: entry for entry in view.runs}
    if job.runs and entries and not job.runs.keys() & entries.keys():
        job.images, job.gpu_s, job.limit = 0, 0.0, None
    for name, run in job.runs.items():
        if name not in entries:
            run.finalised = True
            board.drop_leases(run, now)
    for entry in entries.values():
        _take_up_run(board, job, entry, again=again or resumed, now=now)
    job.images = max(job.images, view.images_before)
    job.gpu_s = max(job.gpu_s, view.gpu_s_before)
    for held in [one for one in board.held.values() if one.lease.job == view.job and not one.attached]:
        board.drop(held, now)
    if view.state != "open":
        for run in job.runs.values():
            board.drop_leases(run, now)
    board.requeue_job(job, now)
    if view.state == "deleted":
        board.forget_runs(job)
    _forget_old_jobs(board)


def _take_up_run(board: Board, job: JobState, entry: RunEntry, *, again: bool, now: float) -> None:
    known = job.runs.get(entry.run)
    if known is not None and known.entry.pass_number >= entry.pass_number:
        if known.entry.pass_number == entry.pass_number and not known.finalised:
            _merge(board, known, entry, now)
            if again and known.stalled:
                known.stalled = known.message = None
                known.idle_deaths = known.finalise_deaths = 0
                board.fit_again(known)
        return
    if known is not None:
        board.drop_leases(known, now)
        board.fit_again(known)
    run = RunState(entry)
    job.runs[entry.run] = board.runs[entry.run] = run
    for held in [one for one in board.held.values() if one.lease.run == entry.run]:
        if may_keep(job, run, held.lease):
            board.attach(job, run, held)
        else:
            board.drop(held, now)


def _merge(board: Board, run: RunState, entry: RunEntry, now: float) -> None:
    """Take in receipts of somebody else's: another farm's, or a renderer's that was cut off."""
    for shard in entry.done.beyond(run.done):
        run.set_done(shard)
        run.failed = max(run.failed, entry.failed)
        for lease in list(run.held.get(shard, ())):
            board.drop(board.held[lease.token], now)


def _forget_old_jobs(board: Board) -> None:
    if len(board.jobs) > JOBS_KEPT:
        over = [name for name, job in board.jobs.items() if job.is_over]
        for name in over[:-JOBS_KEPT]:
            board.forget_runs(board.jobs.pop(name))
