"""`farm submit`: a manifest given to a farm that is up."""

from pathlib import Path
from typing import Annotated

import typer

from farm.cli import remote
from farm.cli.advice import tell
from farm.cli.exits import Exit
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json
from farm.cli.wording import count, printable


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "submit", remote=True)(submit)


def submit(
    options: Options,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML file that says what to render.")],
    append: Annotated[
        bool, typer.Option("--append", help="Render rows appended to a keyed prompt file as a new run of the job.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the job to its end; Ctrl-C leaves it to the farm.")
    ] = False,
) -> Exit:
    """Give a manifest to a farm that is up, by its address and a key.

    The farm renders it whether or not anybody looks. To submit the same manifest again changes nothing. It reads prompt
    files from buckets that the farm allows, not from this machine.
    """
    with options.client() as farm:
        job = farm.submit(manifest, append=append)
        tell(job.warnings)
        if not (options.json and watch):
            if options.json:
                print_json(job.record)
            else:
                note(f"{printable(job.job)}: {count(job.images, 'image')}, {printable(job.state)} at {farm.url}")
        if watch:
            return remote.follow(options, farm, job.job)
    if not options.json:
        note(f"follow it: farm status {job.job} -w")
    return Exit.OK
