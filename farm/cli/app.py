"""The `farm` command: its groups of commands put together, and how it starts and ends."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from farm import __version__
from farm.cli import (
    bench,
    compare,
    controls,
    datasets,
    jobs,
    keys,
    lint,
    machine,
    models,
    plan,
    prompt,
    render,
    retry,
    submit,
    up,
    upkeep,
)
from farm.cli.exits import EPILOG, Exit
from farm.cli.terminal import print_error

app = typer.Typer(
    name="farm",
    help="Render manifests of prompts with diffusion models, on every GPU there is, into a bucket or a folder.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for group in (
    render,
    plan,
    lint,
    submit,
    jobs,
    controls,
    retry,
    datasets,
    compare,
    upkeep,
    prompt,
    up,
    keys,
    models,
    bench,
    machine,
):
    group.register(app)


def _version(asked: bool) -> None:
    if asked:
        print(f"farm {__version__}")
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def run() -> NoReturn:
    """Run the command line and end this process with its exit code.

    Past this point nothing of ours is left to do, and native libraries have threads of their own: Ray's or Arrow's may
    abort the interpreter while it takes itself down, which would turn a command that ended well into a crash. So it is
    not taken down. The commands that start Ray run in a child, which Ray may end as it likes.
    """
    if sys.argv[1:2] not in (["render"], ["retry"], ["up"]):
        os._exit(_run())
    from farm.cli.guard import CommandDiedError, guarded

    try:
        code = guarded(_run)
    except CommandDiedError as death:
        said = (
            f"Ray or the kernel ended this command ({death}); what is stored stays: run it again, with -v for its logs"
        )
        print_error("farm_unavailable", said, as_json="--json" in sys.argv)
        code = int(Exit.UNAVAILABLE)
    os._exit(code)


def _run() -> int:
    """Run the command line to its last byte of output; returns its exit code."""
    code = int(Exit.UNEXPECTED)
    try:
        code = main()
    except KeyboardInterrupt:
        code = int(Exit.INTERRUPTED)
    except Exception as error:  # noqa: BLE001  the hook is Python's own, or ours of one line
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone, or it was closed
            stream.flush()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `arguments` are sys.argv's where they are left out."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a locale without × must not end a command
    try:
        ended = typer.main.get_command(app).main(arguments, prog_name="farm", standalone_mode=False)
    except TyperException as error:
        if message := error.format_message():  # none where no command was given: the help has been printed
            print_error("usage", f"{message.rstrip('.')}; try `farm --help`", as_json="--json" in arguments)
        return int(Exit.INPUT)
    return int(ended or 0)


if __name__ == "__main__":
    run()
