"""`farm render`: plan or resume a manifest's job, render it, and follow it to its end."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from farm.cli.advice import warn
from farm.cli.exits import Exit, exit_code
from farm.cli.following import follow, interruptible, progress_line, spinner
from farm.cli.guard import leave
from farm.cli.options import Options, command
from farm.cli.planning import read_request, submit_request
from farm.cli.summary import summarise
from farm.cli.terminal import note, print_error
from farm.cli.waiting import agreed, begin, held_up, offer_others
from farm.cli.wording import count
from farm.errors import FarmError, RowsAppendedError

if TYPE_CHECKING:
    from actors.cluster import Farm
    from farm.ledger import Ledger
    from farm.lint import Advice
    from farm.run import JobProgress
    from farm.settings import Settings

STAY_EVERY_S = 1.0
STAY_LOOKS = 4
SAID_ONCE = {"--append": False, "--all": False, "--damaged": False, "--images": True}
"""Flags that opened a run or a pass, which a command that goes on with it leaves out; whether a value follows."""

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
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Take every offer without asking: added rows, a pilot's other images.")
    ] = False,
) -> Exit:
    """Render a manifest, or go on with it where it stopped.

    Attaches to a farm that runs here, or starts one for as long as the job takes, and follows the job to its end. Ctrl-C
    leaves a job that the same command goes on with. After a pilot it shows the sheet, and asks before the other images.
    """
    settings = options.settings(renderers=renderers)
    request = read_request(manifest, settings)
    ledger = options.open_ledger(settings)
    probe(ledger)
    try:
        submission = submit_request(request, ledger, append=append)
    except RowsAppendedError as error:
        if not (yes or agreed(options, f"{error.message}. Render the new rows?")):
            raise
        append = True
        submission = submit_request(request, ledger, append=True)
    warn(submission.warnings)
    job, again = submission.plan.job, again_command()
    if append and submission.waiting_rows:
        note(f"{count(submission.waiting_rows, 'added row')} wait until the run in hand has ended")
        if not _reach_end(options, settings, ledger, job, again=again, yes=yes):
            return Exit.WAITING
        submit_request(request, ledger, append=True)
    return render_job(options, settings, ledger, job, again=again, yes=yes, warnings=submission.warnings)


def probe(ledger: "Ledger") -> None:
    """Find out before any work whether the store can be written. Raises StoreError."""
    if not ledger.store.probe().conditional_create:
        note("note: the store has no conditional puts; give a job to one farm at a time")


def render_job(
    options: Options,
    settings: "Settings",
    ledger: "Ledger",
    job: str,
    *,
    again: str,
    yes: bool = False,
    warnings: Sequence["Advice"] = (),
) -> Exit:
    """Render what a submitted job lacks, and say what it came to; `again` is the command that goes on with it.

    `yes`: images that a pilot left out follow without asking. `warnings`: said already, for the record alone. Raises
    WaitingError, CancelledError, FarmUnavailableError.
    """
    if not _reach_end(options, settings, ledger, job, again=again, yes=yes):
        return Exit.WAITING
    return summarise(options, ledger, job, warnings=warnings)


def _reach_end(options: Options, settings: "Settings", ledger: "Ledger", job: str, *, again: str, yes: bool) -> bool:
    """Follow a job until it is done; False when its pilot is, which waits and was summed up."""
    state = begin(options, ledger, job, again=again, yes=yes)
    if state == "done":
        note(f"{job} is done; nothing is left to render")
    if state != "open":
        return state == "done"
    ledger.open(job)

    def others() -> str:
        return offer_others(options, ledger, job, again=again, yes=yes)

    with interruptible() as take_signals:
        last = _follow(options, settings, job, again, take_signals, others)
    if (error := held_up(ledger, last, again=again)) is not None:
        raise error
    return last.state != "pilot"


def _follow(
    options: Options,
    settings: "Settings",
    job: str,
    again: str,
    take_signals: Callable[[], None],
    others: Callable[[], str],
) -> "JobProgress":
    """Follow a job on a farm; when its pilot is done, `others` tells whether it is to be followed on."""
    from actors.cluster import open_farm

    here = True
    try:
        # Ray prints what happens to its processes to stdout, which is for our answer alone.
        with spinner("starting the farm"), redirect_stdout(sys.stderr):
            farm = open_farm(settings, renderers=settings.renderers, give_up=partial(_give_up, options, again))
        with farm:
            take_signals()
            here = farm.started_here
            if settings.renderers and not here:
                note("note: a farm that runs already renders this; --renderers and FARM_RENDERERS do not change it")
            while True:
                with progress_line(job, quiet=options.json) as line, redirect_stdout(sys.stderr):
                    farm.submit(job)
                    last = follow(lambda: farm.progress(job), line=line)
                if last.state == "pilot":
                    last = replace(last, state=others())
                if last.state != "open":
                    break
            with redirect_stdout(sys.stderr):
                _stay(farm, job)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{job} is not done; go on with it: {again}" if here else _goes_on(job)) from None
    except FarmError as error:
        raise type(error)(f"{error.message} (what is stored stays; {again} goes on)") from error
    return last


def _give_up(options: Options, again: str, error: FarmError) -> NoReturn:
    """End this process, whose main thread is in Ray's start and will not come back from it."""
    message = f"{error.message} (what is stored stays; {again} goes on)"
    print_error(error.code, message, as_json=options.json)
    sys.stdout.flush()
    leave(exit_code(error))


def _stay(farm: "Farm", job: str) -> None:
    """Keep a farm that was started here up while commands in other terminals still use it."""
    said, looks = False, 1
    while farm.started_here and looks:
        others = farm.others(job)
        if others and not said:
            note(
                f"nothing is left to do for {job}; this farm still renders {', '.join(others)} for another terminal: "
                "staying (Ctrl-C ends it)"
            )
            said = True
        # A dispatcher that restarted hears of the others' jobs again when their commands ask for progress.
        looks = STAY_LOOKS if others else looks - 1
        time.sleep(STAY_EVERY_S if looks else 0.0)


def again_command(arguments: Sequence[str] | None = None) -> str:
    """The command line that goes on with what this one began: without what is said only once."""
    given: list[str] = []
    value_follows = False
    for one in sys.argv[1:] if arguments is None else arguments:
        flag, equals, _ = one.partition("=")
        if not value_follows and flag not in SAID_ONCE:
            given.append(one)
        value_follows = not value_follows and flag in SAID_ONCE and SAID_ONCE[flag] and not equals
    return shlex.join(["farm", *given])


def _goes_on(job: str) -> str:
    return f"the farm goes on with {job}; look: farm status {job} -w; stop it: farm cancel {job}"
