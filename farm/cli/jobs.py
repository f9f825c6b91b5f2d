"""`farm status`, `farm retry`, `farm cancel`: jobs as the ledger has them, and what is said to them."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.exits import Exit
from farm.cli.moment import now_iso, whoami
from farm.cli.options import Options, command
from farm.cli.render import Renderers, again_command, place, probe, render_job
from farm.cli.terminal import note, print_error, print_json, print_table, say
from farm.cli.wording import age, count, cut, duration, size
from farm.errors import ControlError, RecordError

if TYPE_CHECKING:
    from farm.ledger import Ledger
    from farm.status import JobStatus

WATCH_EVERY_S = 2.0
CLEAR = "\033[H\033[2J"

Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's name: the manifest's `name`.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "status")(status)
    command(app, "retry")(retry)
    command(app, "cancel")(cancel)


def status(
    options: Options,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of them where left out.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again every two seconds; Ctrl-C ends it.")] = False,
) -> Exit:
    """Show how jobs stand.

    Reads the store alone: no farm needs to run. A job is open, cancelled or done.
    """
    ledger = options.open_ledger()
    while True:
        damaged: list[Damaged] = []
        jobs = _all_jobs(ledger, damaged) if job is None else [_one_job(ledger, job)]
        if watch and not options.json:
            say(CLEAR if sys.stdout.isatty() else "")
        _show(options, ledger, jobs, damaged, whole=job is not None)
        if not watch or (jobs and all(one.state != "open" for one in jobs)):
            return Exit.STORE if damaged else Exit.OK
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return Exit.OK


def retry(
    options: Options,
    job: Job,
    render: Annotated[
        bool, typer.Option("--render/--no-render", help="Render them now, or only open the pass.")
    ] = True,
    damaged: Annotated[
        bool,
        typer.Option(
            "--damaged", help="Read every picture, and render again also what is missing or not as its row says."
        ),
    ] = False,
    renderers: Renderers = None,
) -> Exit:
    """Render the failed images of a job again.

    They become a new pass, and what it renders takes the place of the failures. A job that is not done yet is gone on
    with first.
    """
    import numpy as np

    from farm.status import is_cancelled
    from farm.verify import damaged_images

    settings = options.settings(renderers=renderers)
    ledger = options.open_ledger(settings)
    ledger.plan(job)
    if render:
        probe(ledger)
    opened = 0
    unfinished = False
    for plan in ledger.plans(job):
        number = ledger.passes(plan)
        if ledger.totals(plan, number) is None:
            unfinished = True
            continue
        again = ledger.failed_indexes(plan)
        if damaged:
            again = np.union1d(again, damaged_images(ledger, plan))
        if len(again):
            ledger.open(job)
            ledger.open_pass(plan, number + 1, again)
            opened += len(again)
    if not opened and not unfinished:
        note(f"no image of {job} {'failed or is damaged' if damaged else 'failed'}; there is nothing to render again")
        if options.json:
            print_json({"job": job, "reopened": 0})
        return Exit.OK
    if opened:
        note(f"{count(opened, 'image' if damaged else 'failed image')} of {job} will be rendered again")
    else:
        note(f"{job} is not done yet; it goes on, and failed images can be retried after it")
    if render:
        return render_job(options, settings, ledger, job, again=again_command())
    if is_cancelled(ledger, job):
        ledger.append_control(job, "resume", at=now_iso(), by=whoami())
    if options.json:
        print_json({"job": job, "reopened": opened})
    else:
        note(f"render them with: farm retry {job}")
    return Exit.OK


def cancel(options: Options, job: Job) -> Exit:
    """Stop a job; what is stored stays.

    A farm at work on it stops within seconds. `farm render` of its manifest goes on with it.
    """
    from farm.status import job_status

    ledger = options.open_ledger()
    found = job_status(ledger, job)
    if found.state == "done":
        raise ControlError(f"{job} is done, {count(found.done, 'image')}; there is nothing to cancel")
    if found.state == "open":
        ledger.append_control(job, "cancel", at=now_iso(), by=whoami())
    said = f"{job} is cancelled with {found.done:,} of {found.images:,} images; farm render goes on with it"
    if options.json:
        print_json({"job": job, "state": "cancelled", "images": found.images, "done": found.done})
    else:
        note(said if found.state == "open" else f"{job} was cancelled before")
    return Exit.OK


@dataclass(frozen=True, slots=True)
class Damaged:
    """A job one of whose records cannot be read; the other jobs are shown all the same."""

    job: str
    error: RecordError


def _all_jobs(ledger: "Ledger", damaged: list[Damaged]) -> list["JobStatus"]:
    from farm.prefetch import in_order
    from farm.status import job_status

    def look(name: str) -> "JobStatus | Damaged":
        try:
            return job_status(ledger, name)
        except RecordError as error:
            return Damaged(name, error)

    jobs: list[JobStatus] = []
    for one in in_order(look, ledger.jobs(), threads=8):
        if isinstance(one, Damaged):
            damaged.append(one)
        else:
            jobs.append(one)
    return sorted(jobs, key=lambda one: one.created_at, reverse=True)


def _one_job(ledger: "Ledger", job: str) -> "JobStatus":
    from farm.status import job_status

    return job_status(ledger, job)


def _show(options: Options, ledger: "Ledger", jobs: list["JobStatus"], damaged: list[Damaged], *, whole: bool) -> None:
    if options.json:
        records = [_record(one) for one in jobs]
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
        columns = ("job", "state", "model", "images", "done", "failed", "age")
        rows = [
            (
                one.job,
                one.state,
                one.model,
                f"{one.images:,}",
                f"{100 * one.done // one.images} %",
                f"{one.failed:,}" if one.failed else "–",
                age(one.created_at),
            )
            for one in jobs
        ]
        print_table(columns, rows, right=("images", "done", "failed", "age"))


def _show_whole(ledger: "Ledger", found: "JobStatus") -> None:
    from farm.export import dataset_prefix, run_prefix, sheet_key
    from farm.status import failure_groups

    say(f"{found.job}: {found.state}, {found.done:,} of {count(found.images, 'image')}, {found.failed:,} failed")
    say(f"  model      {found.model}")
    say(f"  planned    {found.created_at} ({age(found.created_at)} ago)")
    for plan, run in zip(ledger.plans(found.job), found.runs, strict=True):
        tried = f", pass {run.pass_number}" if run.pass_number > 1 else ""
        say(f"  run        {run.run}{tried}: {run.shards_done:,} of {count(run.shards, 'shard')} done")
        if run.failed:
            for group in failure_groups(ledger, plan):
                say(f"  failed     {count(group.images, 'image')}: {group.code}")
                say(f"             image {group.example.index}: {cut(group.example.error_message or '', 200)}")
        say(f"  pictures   {place(ledger, run_prefix(plan) + 'images/')}")
        if run.totals is not None:
            say(f"  dataset    {place(ledger, dataset_prefix(plan))}")
            say(f"  sheet      {place(ledger, sheet_key(plan))}")
            say(f"  took       {duration(run.totals.wall_seconds)} on {count(run.totals.renderers, 'renderer')}")
            say(f"  size       {size(run.totals.bytes)}")
    if found.state != "done":
        note("farm render of the same manifest goes on with it")
    elif found.failed:
        note(f"render the failed images again: farm retry {found.job}")


def _record(one: "JobStatus") -> dict[str, Any]:
    return {
        "job": one.job,
        "state": one.state,
        "model": one.model,
        "priority": one.priority,
        "images": one.images,
        "done": one.done,
        "failed": one.failed,
        "created_at": one.created_at,
        "finished_at": one.finished_at,
        "runs": [
            {
                "run": run.run,
                "pass_number": run.pass_number,
                "images": run.images,
                "done": run.done,
                "failed": run.failed,
                "shards": run.shards,
                "shards_done": run.shards_done,
                "created_at": run.created_at,
                "totals": run.totals.model_dump(exclude={"version"}) if run.totals else None,
            }
            for run in one.runs
        ],
    }
