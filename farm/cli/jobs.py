"""`farm status`: jobs as the ledger has them."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli import remote
from farm.cli.exits import Exit
from farm.cli.moment import now_iso
from farm.cli.options import Options, command
from farm.cli.summary import gpu_time, places, show_failures
from farm.cli.terminal import note, print_error, print_json, print_table, say
from farm.cli.wording import age, count, duration, gpu_hours, printable, size
from farm.errors import RecordError, UnknownJobError

if TYPE_CHECKING:
    from farm.ledger import Ledger
    from farm.records import Control
    from farm.status import JobStatus, RunStatus

WATCH_EVERY_S = 2.0
CLEAR = "\033[H\033[2J"
ENDED = frozenset({"done", "cancelled", "deleted"})

Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's name: the manifest's `name`.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "status", remote=True)(status)


def status(
    options: Options,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of them where left out.")] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Look again every two seconds until all is done; Ctrl-C ends it."),
    ] = False,
) -> Exit:
    """Show how jobs stand.

    Reads the store alone: no farm needs to run. With an address (FARM_URL) it asks that farm. A job is open, paused, cancelled
    or done; `pilot` when its pilot is done and waits for `farm approve`.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.status(options, farm, job, watch=watch)
    ledger = options.open_ledger()
    while True:
        damaged: list[Damaged] = []
        jobs = _all_jobs(ledger, damaged) if job is None else [_one_job(ledger, job)]
        if watch and not options.json:
            say(CLEAR if sys.stdout.isatty() else "")
        _show(options, ledger, jobs, damaged, whole=job is not None)
        if not watch or (jobs and all(one.state in ENDED for one in jobs)):
            return Exit.STORE if damaged else Exit.OK
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return Exit.OK


@dataclass(frozen=True, slots=True)
class Damaged:
    """A job one of whose records cannot be read; the other jobs are shown all the same."""

    job: str
    error: RecordError


def _all_jobs(ledger: "Ledger", damaged: list[Damaged]) -> list["JobStatus"]:
    from farm.prefetch import in_order
    from farm.status import job_status

    def look(name: str) -> "JobStatus | Damaged | None":
        try:
            return job_status(ledger, name)
        except UnknownJobError:
            return None  # a submission that has not come to its plan yet, or never did
        except RecordError as error:
            return Damaged(name, error)

    jobs: list[JobStatus] = []
    for one in in_order(look, ledger.jobs(), threads=8):
        if isinstance(one, Damaged):
            damaged.append(one)
        elif one is not None:
            jobs.append(one)
    return sorted(jobs, key=lambda one: one.created_at, reverse=True)


def _one_job(ledger: "Ledger", job: str) -> "JobStatus":
    from farm.status import job_status

    return job_status(ledger, job)


def _show(options: Options, ledger: "Ledger", jobs: list["JobStatus"], damaged: list[Damaged], *, whole: bool) -> None:
    if options.json:
        from farm.jobrecord import job_record

        records = [job_record(one).model_dump() for one in jobs]
        unread = [{"job": one.job, "code": one.error.code, "message": one.error.message} for one in damaged]
        print_json(records[0] if whole else {"jobs": records, "damaged": unread})
        return
    for one in damaged:
        print_error(one.error.code, f"{one.job}: {one.error.message}", as_json=False)
    if not jobs:
        if damaged:
            return
        note(f"no jobs in {ledger.store.url}; farm render MANIFEST makes one")
    elif whole:
        _show_whole(ledger, jobs[0])
    else:
        columns = ("job", "state", "model", "images", "done", "failed", "priority", "owner", "age")
        rows = [
            (
                one.job,
                one.state,
                one.model,
                f"{one.images:,}",
                f"{100 * one.done // one.images} %" if one.images else "–",
                f"{one.failed:,}" if one.failed else "–",
                str(one.priority),
                printable(one.owner) or "–",
                age(one.created_at) if one.created_at else "–",
            )
            for one in jobs
        ]
        print_table(columns, rows, right=("images", "done", "failed", "priority", "age"))


def _show_whole(ledger: "Ledger", found: "JobStatus") -> None:
    if found.state == "deleted":
        say(f"{found.job}: deleted")
        note(f"what is left of it is swept by: farm delete {found.job}")
        return
    say(f"{found.job}: {found.state}, {found.done:,} of {count(found.images, 'image')}, {found.failed:,} failed")
    say(f"  model      {found.model}")
    if found.owner:
        say(f"  owner      {printable(found.owner)}")
    say(f"  priority   {found.priority}")
    if limits := _limits(found):
        say(f"  stops at   {', '.join(limits)}")
    if found.last is not None:
        say(f"  said last  {words_of(found.last)}")
    say(f"  planned    {found.created_at} ({age(found.created_at)} ago)")
    for plan, run in zip(ledger.plans(found.job), found.runs, strict=True):
        tried = f", pass {run.pass_number}" if run.pass_number > 1 else ""
        say(f"  run        {run.run}{tried}: {run.shards_done:,} of {count(run.shards, 'shard')} done")
        if run.pilot is not None:
            say(f"  pilot      {count(run.pilot, 'image')}, {_pilot_state(run, found)}")
        if run.failed:
            show_failures(ledger, plan)
        for label, where in places(ledger, plan).items():
            if label == "pictures" or run.totals is not None:
                say(f"  {label:<10} {where}")
        if run.totals is not None:
            say(f"  took       {duration(run.totals.wall_seconds)} on {count(run.totals.renderers, 'renderer')}")
            say(f"  GPU time   {gpu_time(run.totals)}")
            say(f"  size       {size(run.totals.bytes)}")
    if advice := _advice(found):
        note(advice)


def words_of(control: "Control") -> str:
    """What somebody said to a job, and when: `pause, by ann@desk, 45 s ago`."""
    names = ("priority", "max_images", "gpu_hours", "finish_by")
    values = [f"{name} {value}" for name in names if (value := getattr(control, name)) is not None]
    said = " ".join([control.action, *values])
    return f"{said}, by {printable(control.by)}, {age(control.at)} ago"


def _limits(found: "JobStatus") -> list[str]:
    limits = found.limits
    said = []
    if (left := limits.seconds_left(now_iso())) is not None:
        said.append(f"{limits.finish_by} ({f'in {duration(left)}' if left > 0 else 'has passed'})")
    if limits.gpu_hours is not None:
        said.append(gpu_hours(limits.gpu_hours))
    if limits.max_images is not None:
        said.append(f"{count(limits.max_images, 'image')} rendered")
    return said


def _pilot_state(run: "RunStatus", found: "JobStatus") -> str:
    done = run.pass_number > 1 or run.totals is not None
    if found.approved:
        return "done and approved" if done else "approved before it is done"
    return f"done, waits for farm approve {found.job}" if done else "not done yet"


def _advice(found: "JobStatus") -> str | None:
    job = found.job
    match found.state:
        case "pilot":
            return f"look at the pilot's sheet; render the other images with: farm approve {job}"
        case "paused":
            return f"go on with it: farm resume {job}"
        case "cancelled":
            return f"go on with it: farm resume {job}, or farm render of the same manifest"
        case "done":
            return f"render the failed images again: farm retry {job}" if found.failed else None
    left = found.limits.seconds_left(now_iso())
    if left is not None and left <= 0:
        return f"its finish_by has passed; give it a later one: farm change {job} --finish-by T"
    return "farm render of the same manifest goes on with it"
