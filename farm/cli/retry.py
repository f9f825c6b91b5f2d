"""`farm retry`: images of a job rendered again, as a new pass."""

from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli import remote
from farm.cli.exits import Exit
from farm.cli.jobs import Job
from farm.cli.moment import now_iso, whoami
from farm.cli.options import Options, command
from farm.cli.render import Renderers, again_command, probe, render_job
from farm.cli.terminal import note, print_json
from farm.errors import ControlError

if TYPE_CHECKING:
    from farm.controls import Which


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "retry", remote=True)(retry)


def retry(
    options: Options,
    job: Job,
    every: Annotated[bool, typer.Option("--all", help="Every image, not only those that failed.")] = False,
    images: Annotated[
        str | None, typer.Option("--images", metavar="LIST", help="These images, by index: 3,7-20.")
    ] = None,
    damaged: Annotated[
        bool,
        typer.Option(
            "--damaged", help="Read every picture, and render again also what is missing or not as its row says."
        ),
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Of this run, where the job has several.")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render/--no-render", help="Render them now, or only open the pass.")
    ] = True,
    renderers: Renderers = None,
) -> Exit:
    """Render the failed images of a job again, or all, or those listed.

    They become a new pass, and what it renders takes the place of what was there. A job that is not done yet goes on
    first; a paused or cancelled one is resumed. With an address (FARM_URL) that farm renders them.
    """
    if every and images is not None:
        raise ControlError("--all and --images exclude each other; leave one of them out")
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_said(
                options, farm.retry(job, images="all" if every else images, damaged=damaged, run=run)
            )
    from farm.controls import parse_indexes, retry

    which: Which = "all" if every else "failed" if images is None else parse_indexes(images)
    settings = options.settings(renderers=renderers)
    ledger = options.open_ledger(settings)
    if render:
        ledger.plan(job)
        probe(ledger)
    found = retry(ledger, job, which=which, damaged=damaged, run=run, at=now_iso(), by=whoami())
    note(found.message)
    if render and (found.opened or found.unfinished):
        return render_job(options, settings, ledger, job, again=again_command())
    if options.json:
        print_json({"job": job, "reopened": found.opened, "unfinished": found.unfinished, "resumed": found.resumed})
    elif found.opened or found.unfinished:
        note(f"a farm that runs renders them; where none runs: farm retry {job}")
    return Exit.OK
