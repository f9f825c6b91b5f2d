"""`farm render`: plan or resume a manifest's job, render it, and follow it to its end."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.exits import Exit
from farm.cli.following import follow, interruptible, progress_line, spinner
from farm.cli.moment import now_iso, whoami
from farm.cli.options import Options, command
from farm.cli.planning import read_request, submit_request
from farm.cli.terminal import note, print_json, say
from farm.cli.wording import count, cut, duration, rate, size
from farm.errors import CancelledError, FarmError, FarmUnavailableError, RowsAppendedError

if TYPE_CHECKING:
    from actors.cluster import Farm
    from farm.ledger import Ledger
    from farm.plan import Plan
    from farm.records import Totals
    from farm.settings import Settings

STAY_EVERY_S = 1.0
STAY_LOOKS = 4

Renderers = Annotated[
    int | None,
    typer.Option("--renderers", min=1, metavar="N", help="Renderers to start; one per GPU, or one on the CPU."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "render")(render)


def render(
    options: Options,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML file that says what to render.")],
    append: Annotated[
        bool, typer.Option("--append", help="Render rows appended to a keyed prompt file as a new run of the job.")
    ] = False,
    renderers: Renderers = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take every offer without asking.")] = False,
) -> Exit:
    """Render a manifest, or go on with it where it stopped.

    Attaches to a farm that runs here, or starts one for as long as the job takes, and follows the job to its end. Ctrl-C
    leaves a job that the same command goes on with.
    """
    settings = options.settings(renderers=renderers)
    request = read_request(manifest, settings)
    ledger = options.open_ledger(settings)
    probe(ledger)
    try:
        submission = submit_request(request, ledger, append=append)
    except RowsAppendedError as error:
        if not (yes or _agreed(options, error.message)):
            raise
        append = True
        submission = submit_request(request, ledger, append=True)
    job = submission.plan.job
    if append and submission.waiting_rows:
        note(f"{count(submission.waiting_rows, 'added row')} wait until the run in hand has ended")
        _follow_job(options, settings, ledger, job, again=again_command())
        submit_request(request, ledger, append=True)
    return render_job(options, settings, ledger, job, again=again_command())


def probe(ledger: "Ledger") -> None:
    """Find out before any work whether the store can be written. Raises StoreError."""
    if not ledger.store.probe().conditional_create:
        note("note: the store has no conditional puts; give a job to one farm at a time")


def render_job(options: Options, settings: "Settings", ledger: "Ledger", job: str, *, again: str) -> Exit:
    """Render what a submitted job lacks, and say what it came to; `again` is the command that goes on with it."""
    if all(ledger.totals(plan) is not None for plan in ledger.plans(job)):
        note(f"{job} is done; nothing is left to render")
    else:
        _follow_job(options, settings, ledger, job, again=again)
    return summarise(options, ledger, job)


def _follow_job(options: Options, settings: "Settings", ledger: "Ledger", job: str, *, again: str) -> None:
    from farm.status import is_cancelled

    if is_cancelled(ledger, job):
        ledger.append_control(job, "resume", at=now_iso(), by=whoami())
        note(f"{job} was cancelled; it goes on")
    ledger.open(job)
    with interruptible() as take_signals:
        _follow(options, settings, job, again, take_signals)


def _follow(options: Options, settings: "Settings", job: str, again: str, take_signals: Callable[[], None]) -> None:
    from actors.cluster import open_farm

    here = True
    try:
        with spinner("starting the farm"):
            farm = open_farm(settings, renderers=settings.renderers)
        with farm:
            take_signals()
            here = farm.started_here
            if settings.renderers and not here:
                note("note: a farm that runs already renders this; --renderers and FARM_RENDERERS do not change it")
            farm.submit(job)
            with progress_line(job, quiet=options.json) as line:
                last = follow(lambda: farm.progress(job), line=line)
            _stay(farm, job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{job} is not done; go on with it: {again}" if here else _goes_on(job)) from None
    except FarmError as error:
        raise type(error)(f"{error.message} (what is stored stays; {again} goes on)") from error
    if last.state == "cancelled":
        raise CancelledError(
            f"{job} was cancelled with {last.done:,} of {last.images:,} images; go on with it: {again}"
        )


def _stay(farm: "Farm", job: str) -> None:
    """Keep a farm that was started here up while commands in other terminals still use it."""
    said, looks = False, 1
    while farm.started_here and looks:
        others = farm.others(job)
        if others and not said:
            note(
                f"{job} is done; this farm still renders {', '.join(others)} for another terminal: staying (Ctrl-C ends it)"
            )
            said = True
        # A dispatcher that restarted hears of the others' jobs again when their commands ask for progress.
        looks = STAY_LOOKS if others else looks - 1
        time.sleep(STAY_EVERY_S if looks else 0.0)


def summarise(options: Options, ledger: "Ledger", job: str) -> Exit:
    """Print what a finished job came to. The exit code says whether images failed."""
    from farm.status import failure_groups

    plans = ledger.plans(job)
    every = [ledger.totals(plan) for plan in plans]
    ended = [(plan, totals) for plan, totals in zip(plans, every, strict=True) if totals is not None]
    if len(ended) < len(plans):
        raise FarmUnavailableError(f"the farm ended before {job} was done; what is stored stays: run the command again")
    failed = sum(totals.failed for _, totals in ended)
    records = [_summary(ledger, plan, totals) for plan, totals in ended]
    if options.json:
        print_json({"job": job, "state": "done", "failed": failed, "runs": records})
        return Exit.IMAGES_FAILED if failed else Exit.OK
    for (plan, totals), record in zip(ended, records, strict=True):
        name = job if len(plans) == 1 else f"{job}, run {plan.run}"
        said = [f"{name}: {totals.ok:,} of {count(totals.images, 'image')}, {size(totals.bytes)},"]
        said.append(f"in {duration(totals.wall_seconds)} on {count(totals.renderers, 'renderer')}")
        if totals.wall_seconds > 0:
            said.append(f"({rate(totals.ok / totals.wall_seconds)})")
        say(" ".join(said))
        if options.verbose:
            say(
                "  times      "
                + " · ".join(f"{name} {duration(s)}" for name, s in totals.seconds.items() if name != "total")
            )
        if totals.flagged:
            say(f"  flagged    {count(totals.flagged, 'picture')} of one colour only; column `flag` of the dataset")
        for group in failure_groups(ledger, plan) if totals.failed else ():
            say(f"  failed     {count(group.images, 'image')}: {group.code}")
            say(f"             image {group.example.index}: {cut(group.example.error_message or '', 200)}")
        for label in ("pictures", "dataset", "sheet"):
            say(f"  {label:<10} {record[label]}")
    if failed:
        note(f"{count(failed, 'image')} failed; render them again: farm retry {job}")
    return Exit.IMAGES_FAILED if failed else Exit.OK


def _summary(ledger: "Ledger", plan: "Plan", totals: "Totals") -> dict[str, object]:
    """One run's totals and where its objects are."""
    from farm.export import dataset_prefix, run_prefix, sheet_key

    return {
        "run": plan.run,
        **totals.model_dump(exclude={"version"}),
        "pictures": place(ledger, f"{run_prefix(plan)}images/"),
        "dataset": place(ledger, dataset_prefix(plan)),
        "sheet": place(ledger, sheet_key(plan)),
    }


def place(ledger: "Ledger", key: str) -> str:
    """Where an object is, as a person would type it: a path below this folder is relative."""
    url = ledger.store.url
    if "://" in url:
        return f"{url}/{key}"
    path = Path(url) / key
    relative = os.path.relpath(path)
    return f"./{relative}" if not relative.startswith("..") else str(path)


def again_command(arguments: Sequence[str] | None = None) -> str:
    """The command line that goes on with what this one began."""
    given = [one for one in (sys.argv[1:] if arguments is None else arguments) if one != "--append"]
    return shlex.join(["farm", *given])


def _agreed(options: Options, offer: str) -> bool:
    """Ask a person on a terminal; nobody there means no."""
    if options.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    note(offer)
    try:
        return typer.confirm("Render the new rows?", err=True)
    except typer.Abort:
        return False


def _goes_on(job: str) -> str:
    return f"the farm goes on with {job}; look: farm status {job} -w; stop it: farm cancel {job}"
