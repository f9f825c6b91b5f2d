"""`farm up`, `farm down`: the farm with its endpoint, from its start until somebody ends it."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from farm.cli.exits import Exit, exit_code
from farm.cli.following import interruptible, spinner
from farm.cli.guard import leave
from farm.cli.moment import user_name
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_error, print_json, say
from farm.errors import FarmUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from farm.settings import Settings
    from farm.whereabouts import Whereabouts

LOOK_EVERY_S = 1.0
DOWN_S = 60.0
"""How long `farm down` waits for the farm to end; requests and renders in hand are told within a second."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "up")(up)
    command(app, "down")(down)


def up(
    options: Options,
    host: Annotated[
        str | None, typer.Option("--host", metavar="HOST", help="Address to listen on (FARM_HTTP_HOST).")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="Port to listen on, 0 for any (FARM_HTTP_PORT).")
    ] = None,
    renderers: Annotated[
        int | None,
        typer.Option(
            "--renderers",
            min=1,
            metavar="N",
            help="Renderers to start; one per GPU; without, one per core, four at most.",
        ),
    ] = None,
) -> Exit:
    """Start the farm and its endpoint, and stay until Ctrl-C or `farm down`.

    Prints the endpoint's address once it answers, and renders every job of the store that is not done. Needs no key on
    127.0.0.1; elsewhere keys and TLS must be in place first.
    """
    settings = options.settings(http_host=host, http_port=port, renderers=renderers)
    settings = settings.model_copy(update={"owner": settings.owner or user_name()})
    _refuse(options, settings)
    with interruptible() as take_signals:
        try:
            _serve(options, settings, take_signals)
        except KeyboardInterrupt:
            note("the farm is down; what is stored stays, farm up goes on with it")
    return Exit.OK


def down(options: Options) -> Exit:
    """End the farm that `farm up` keeps for this store, and its endpoint; what is stored stays.

    With a Ray address set (FARM_ADDRESS), the farm there, if nobody on this machine keeps it. Ray itself stays up.
    """
    from farm.whereabouts import living, note_file

    settings = options.settings()
    found = living(note_file(settings))
    left = _clear_away(note_file(settings)) if found is None else None
    if found is not None and found.command != "up":
        raise FarmUnavailableError(
            f"that farm belongs to farm render (process {found.pid}) and ends with its job; stop it there, with Ctrl-C"
        )
    if found is not None:
        _stop(found)
        said = f"the farm at {found.url or 'this machine'} is down"
    elif settings.address and _take_down(settings):
        said = f"the farm at {settings.address} is down"
    elif left is not None:
        said = f"no farm runs for {settings.store}; what one left that was killed (process {left.pid}) is cleared away"
    else:
        said = f"no farm runs for {settings.store}; nothing was to be done"
    if options.json:
        print_json({"message": said, "url": found.url if found else None})
    else:
        note(said)
    return Exit.OK


def _refuse(options: Options, settings: "Settings") -> None:
    """Find out before anything starts what would leave the endpoint open, or without its store. Raises FarmError."""
    from farm.cli.render import probe
    from farm.errors import SettingsError
    from farm.exposure import refuse_exposure
    from farm.keys import Keys
    from farm.whereabouts import refuse_second

    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise SettingsError(
            f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}: Ray's ports would take anybody's commands; leave it out"
        )
    refuse_second(settings)
    ledger = options.open_ledger(settings)
    probe(ledger)
    refuse_exposure(settings, has_keys=Keys(ledger.store).any())


def _serve(options: Options, settings: "Settings", take_signals: Callable[[], None]) -> None:
    """Keep the farm up until it ends, which is an error, or a signal does."""
    from actors.cluster import bring_up
    from actors.serving import Endpoint

    # Ray prints what happens to its processes to stdout, which is for our answer alone.
    with Endpoint(settings) as endpoint, redirect_stdout(sys.stderr), ExitStack() as leaving:
        give_up = partial(_give_up, options)
        with spinner("starting the farm"):
            farm = bring_up(
                endpoint.settings, environment=endpoint.environment, folder=endpoint.folder, give_up=give_up
            )
        with farm:
            try:
                take_signals()
                with spinner("starting the endpoint"), farm.watched(give_up):
                    from actors.gateway import gateway_app

                    endpoint.start(gateway_app)
                take_signals()
                farm.announce(endpoint.url)
                with redirect_stdout(sys.__stdout__ or sys.stderr):
                    _tell(options, endpoint.url)
                while True:
                    farm.check()
                    time.sleep(LOOK_EVERY_S)
            finally:
                # What Ray says of its processes that were asked to end is no news.
                leaving.enter_context(redirect_stdout(StringIO()))
                endpoint.stop()


def _tell(options: Options, url: str) -> None:
    if options.json:
        print_json({"url": url, "pid": os.getpid()})
    else:
        say(url)
        note(f"the farm is up at {url}, its documentation at {url}/docs; Ctrl-C or farm down ends it")


def _stop(found: "Whereabouts") -> None:
    with suppress(ProcessLookupError):
        os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_S
    while found.lives:
        if time.monotonic() > deadline:
            raise FarmUnavailableError(
                f"process {found.pid} was asked to end {DOWN_S:.0f} s ago and has not; end it with kill -9 {found.pid}, "
                "what is stored stays"
            )
        time.sleep(0.1)


def _clear_away(note_of_it: "Path") -> "Whereabouts | None":
    """Remove what a killed farm left, unless one starts at this moment, which does so itself."""
    from filelock import FileLock, Timeout

    from farm.whereabouts import clear_away

    try:
        with FileLock(note_of_it.with_suffix(".lock"), timeout=0):
            return clear_away(note_of_it)
    except Timeout:
        return None


def _take_down(settings: "Settings") -> bool:
    from actors.cluster import take_down

    with redirect_stdout(sys.stderr):
        return take_down(settings)


def _give_up(options: Options, error: FarmUnavailableError) -> NoReturn:
    """End this process, whose main thread is in Ray's start and will not come back from it."""
    print_error(error.code, f"{error.message} (what is stored stays)", as_json=options.json)
    sys.stdout.flush()
    leave(exit_code(error))
