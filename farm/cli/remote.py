"""What commands show of a farm that they reach by its endpoint: the same words and exit codes as on a store."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from farm.cli.exits import Exit
from farm.cli.following import RUNNING, Line, news, progress_line
from farm.cli.options import Options
from farm.cli.terminal import note, print_error, print_json, print_table, say
from farm.cli.wording import age, count, cut, duration, gpu_hours, printable, size
from farm.errors import CancelledError, UnknownJobError, WaitingError

if TYPE_CHECKING:
    from farm.client import Client, Job, Model
    from farm.client.answers import Progress

WATCH_EVERY_S = 2.0
AGAIN_S = 1.0
CLEAR = "\033[H\033[2J"
GOING_ON = RUNNING | {"open"}
"""States in which a job needs nobody to speak; `open` is what the store says of one that its farm has not looked at yet."""
HELD_UP = frozenset({"stalled", "stopped"})
"""States in which a farm stopped a job by itself: the store calls it open."""
TOLD_BY_STORE = frozenset({"done", "cancelled", "deleted", "paused", "pilot"})


def status(options: Options, farm: "Client", job: str | None, *, watch: bool) -> Exit:
    """Show how jobs of a farm stand; `watch` follows one by its events, and all of them by looking again."""
    if job is not None:
        return follow(options, farm, job) if watch else show_job(options, farm.status(job))
    while True:
        pages = list(farm.job_pages())
        jobs = [one for page in pages for one in page.items]
        damaged = [one for page in pages for one in page.damaged]
        if watch and not options.json:
            say(CLEAR if sys.stdout.isatty() else "")
        if options.json:
            print_json({"jobs": [one.record for one in jobs], "damaged": damaged})
        else:
            for one in damaged:
                print_error(str(one.get("code")), f"{one.get('job')}: {one.get('message')}", as_json=False)
            show_jobs(farm, jobs)
        if not watch or (jobs and all(one.ended for one in jobs)):
            return Exit.STORE if damaged else Exit.OK
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return Exit.OK


def follow(options: Options, farm: "Client", job: str) -> Exit:
    """Follow a job to its end, or until it waits for a person, and say what it came to.

    Raises WaitingError, CancelledError, FarmUnavailableError.
    """
    farm.status(job)  # which raises for a job that never was, and names the nearest
    try:
        while True:
            with progress_line(job, quiet=options.json) as line:
                last = _watch(line, farm, job)
            found = farm.status(job)
            if found.state != "open" or last is None or last.state not in TOLD_BY_STORE:
                return ended(options, found, why=last.message if last else None)
            time.sleep(AGAIN_S)  # what was told is seconds old, and somebody let the job go on since
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the farm goes on with {job}; look: farm status {job} -w") from None
    except UnknownJobError as exc:
        raise CancelledError(f"{job} was deleted") from exc


def _watch(line: Line, farm: "Client", job: str) -> "Progress | None":
    """Show what a farm tells of a job for as long as it goes on by itself; returns the last."""
    from farm.client.answers import Progress, read

    said: str | None = None
    now: Progress | None = None
    for event in farm.watch(job, images="none"):
        if event.kind == "progress":
            now = read(Progress, event.data, url=farm.url)
            said = _show(line, now, said)
            if now.state not in GOING_ON:
                break
    return now


def ended(options: Options, found: "Job", *, why: str | None) -> Exit:
    """Print what a followed job came to; the exit code says whether images failed. `why`: it goes no further."""
    job = found.job
    match found.state:
        case "cancelled":
            raise CancelledError(f"{job} was cancelled with {_rendered(found)}; go on with it: farm resume {job}")
        case "deleted":
            raise CancelledError(f"{job} was deleted")
        case "paused":
            raise WaitingError(f"{job} is paused with {_rendered(found)}; go on with it: farm resume {job}")
        case "pilot":
            raise WaitingError(f"the pilot of {job} is done; look at its sheet, then: farm approve {job}")
        case "open":
            raise WaitingError(f"{job} goes no further with {_rendered(found)}: {why or 'it gives no reason'}")
    show_job(options, found)
    return Exit.IMAGES_FAILED if found.failed else Exit.OK


def show_jobs(farm: "Client", jobs: Sequence["Job"]) -> None:
    """Print a table of jobs."""
    if not jobs:
        note(f"no jobs at {farm.url}; farm submit MANIFEST makes one")
        return
    columns = ("job", "state", "model", "images", "done", "failed", "priority", "owner", "age")
    rows = [
        (
            printable(one.job),
            printable(_state(one)),
            printable(one.model),
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


def show_job(options: Options, found: "Job") -> Exit:
    """Print how one job stands."""
    if options.json:
        print_json(found.record)
        return Exit.OK
    say(f"{printable(found.job)}: {printable(_state(found))}, {_rendered(found)}, {found.failed:,} failed")
    if found.state == "deleted":
        return Exit.OK
    say(f"  model      {printable(found.model)}")
    if found.owner:
        say(f"  owner      {printable(found.owner)}")
    say(f"  priority   {found.priority}")
    if limits := _limits(found):
        say(f"  stops at   {', '.join(limits)}")
    if found.said_last:
        said = found.said_last
        say(
            f"  said last  {printable(str(said.get('action')))}, by {printable(str(said.get('by')))}, {age(said['at'])} ago"
        )
    say(f"  planned    {found.created_at} ({age(found.created_at)} ago)")
    for run in found.runs:
        tried = f", pass {run.pass_number}" if run.pass_number > 1 else ""
        say(f"  run        {printable(run.run)}{tried}: {run.shards_done:,} of {count(run.shards, 'shard')} done")
        if run.pilot is not None:
            say(f"  pilot      {count(run.pilot, 'image')}{', approved' if found.approved else ''}")
        if run.totals is not None:
            _show_totals(run.totals)
    if found.live is not None and found.live.message:
        say(f"  note       {printable(found.live.message)}")
    if advice := _advice(found):
        note(advice)
    return Exit.OK


def show_said(options: Options, answer: dict[str, Any]) -> Exit:
    """Print what came of something said to a job."""
    if options.json:
        print_json(answer)
    else:
        note(printable(str(answer.get("message", ""))))
    return Exit.OK


def show_models(options: Options, farm: "Client", name: str | None) -> Exit:
    """Print the farm's models, and how soon each could draw."""
    models = [farm.model(name)] if name else farm.models()
    if options.json:
        records = [one.record for one in models]
        print_json(records[0] if name else {"models": records})
        return Exit.OK
    rows = [(printable(one.id), cut(one.title or "–", 60), _readiness(one)) for one in models]
    print_table(("name", "title", "ready"), rows)
    return Exit.OK


def _readiness(model: "Model") -> str:
    ready = model.readiness
    match ready.state:
        case "loaded":
            wait = f", begins in {duration(ready.wait_seconds)}" if ready.wait_seconds else ""
            return f"loaded by {count(ready.renderers, 'renderer')}{wait}"
        case "unsuited":
            return f"no: {cut(ready.reason or 'the devices are not fit for it', 60)}"
        case "unknown":
            return "unknown: the farm does not answer"
    loads = "" if ready.load_seconds is None else f", loads in {duration(ready.load_seconds)}"
    return f"{printable(ready.state)}{loads}"


def _show(line: Line, progress: "Progress", said: str | None) -> str | None:
    message = news(progress)
    if message and message != said:
        note(f"note: {printable(message)}")
    if progress.state in RUNNING:
        line.show(progress)
    return message


def _show_totals(totals: dict[str, Any]) -> None:
    if (wall := totals.get("wall_seconds")) is not None:
        say(f"  took       {duration(wall)} on {count(totals.get('renderers', 0), 'renderer')}")
    if (worked := totals.get("gpu_seconds")) is not None:
        say(f"  GPU time   {duration(worked)}")
    if (number_bytes := totals.get("bytes")) is not None:
        say(f"  size       {size(number_bytes)}")


def _state(found: "Job") -> str:
    """The job's state; of one that is open and goes no further, what the farm calls that."""
    live = found.live
    return live.state if found.state == "open" and live is not None and live.state in HELD_UP else found.state


def _rendered(found: "Job") -> str:
    return f"{found.done:,} of {count(found.images, 'image')}"


def _limits(found: "Job") -> list[str]:
    said = []
    if found.finish_by is not None:
        said.append(found.finish_by)
    if found.gpu_hours is not None:
        said.append(gpu_hours(found.gpu_hours))
    if found.max_images is not None:
        said.append(f"{count(found.max_images, 'image')} rendered")
    return said


def _advice(found: "Job") -> str | None:
    job = found.job
    match found.state:
        case "pilot":
            return f"look at the pilot's sheet; render the other images with: farm approve {job}"
        case "paused" | "cancelled":
            return f"go on with it: farm resume {job}"
        case "done" if found.failed:
            return f"render the failed images again: farm retry {job}"
        case "open" if _state(found) == "stalled":
            return f"when its trouble is mended, the farm tries again: farm resume {job}"
        case "open":
            return f"follow it: farm status {job} -w"
    return None
