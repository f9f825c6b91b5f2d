"""What every command takes (`--store`, `--json`, `-v` and their like) and how every command ends.

`command` adds the shared flags to a function, hands them over as one `Options`, and turns errors into one readable
line and an exit code. Nothing else in the CLI catches an error to print it.
"""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.exits import Exit, exit_code
from farm.cli.terminal import log_to_stderr, note, print_error
from farm.errors import FarmError, SettingsError

if TYPE_CHECKING:
    from farm.client import Client
    from farm.ledger import Ledger
    from farm.settings import Settings
    from farm.storage.base import ObjectStore

_BREAK = re.compile(r"(?<!\n)\n(?!\n)")

RENDERING = frozenset(
    {"boto3", "diffusers", "fastapi", "filelock", "matplotlib", "numpy", "psutil", "pyarrow", "ray", "torch"}
)
"""Packages of the extra `farm` that commands come upon first."""

Command = Callable[..., Exit | None]


@dataclass(frozen=True, slots=True)
class Options:
    """The shared flags of one call."""

    store: str | None = None
    s3_endpoint: str | None = None
    models: Path | None = None
    json: bool = False
    verbose: bool = False
    url: str | None = None

    def endpoint(self) -> "Client | None":
        """Return a client of the endpoint that the command is to speak to; None where it works on a store.

        A flag goes before the settings, and there an endpoint before a store. Raises SettingsError.
        """
        if self.store is not None:
            if self.url is not None:
                raise SettingsError("--store and --url exclude each other; leave one of them out")
            return None
        if self.url is None and self.settings().url is None:
            return None
        return self.client()

    def client(self) -> "Client":
        """Return a client of the endpoint that `--url` or the settings name. Raises SettingsError where none does."""
        from farm.client import Client

        return Client(self.url)

    def settings(self, **own: object) -> "Settings":
        """Read the settings: these flags, and a command's `own`, over `FARM_*` variables over `farm.toml`.

        Raises SettingsError.
        """
        from farm.settings import load_settings

        return load_settings(store=self.store, s3_endpoint=self.s3_endpoint, models=self.models, **own)

    def open_store(self, settings: "Settings | None" = None) -> "ObjectStore":
        """Open the store that the settings name."""
        from farm.storage.opening import open_store

        settings = settings or self.settings()
        return open_store(settings.store, settings)

    def open_ledger(self, settings: "Settings | None" = None) -> "Ledger":
        """Open the ledger in the store that the settings name."""
        from farm.ledger import Ledger

        settings = settings or self.settings()
        if settings.url is not None and "store" not in settings.model_fields_set:
            note(f"note: this works on the store {settings.store}, not on the farm of FARM_URL")
        return Ledger(self.open_store(settings))


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter as Typer reads it."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


PANEL = "Everywhere"

SHARED = (
    keyword(
        "store",
        Annotated[
            str | None,
            typer.Option(
                "--store", metavar="URL", help="A folder, or s3://bucket/prefix (FARM_STORE).", rich_help_panel=PANEL
            ),
        ],
        None,
    ),
    keyword(
        "s3_endpoint",
        Annotated[
            str | None,
            typer.Option(
                "--s3-endpoint", metavar="URL", help="The S3 server (FARM_S3_ENDPOINT).", rich_help_panel=PANEL
            ),
        ],
        None,
    ),
    keyword(
        "models",
        Annotated[
            Path | None,
            typer.Option(
                "--models", metavar="DIR", help="Model cards of your own (FARM_MODELS).", rich_help_panel=PANEL
            ),
        ],
        None,
    ),
    keyword(
        "json",
        Annotated[bool, typer.Option("--json", help="Print JSON, errors too.", rich_help_panel=PANEL)],
        False,
    ),
    keyword(
        "verbose",
        Annotated[
            bool,
            typer.Option("--verbose", "-v", help="Show logs, times by stage, tracebacks.", rich_help_panel=PANEL),
        ],
        False,
    ),
)

REMOTE = keyword(
    "url",
    Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="The endpoint of a farm that is up, in place of a store (FARM_URL; its key: FARM_KEY).",
            rich_help_panel=PANEL,
        ),
    ],
    None,
)


def command(app: typer.Typer, name: str, *, remote: bool = False) -> Callable[[Command], Command]:
    """Register a function whose first parameter is `Options` as a command that also takes the shared flags.

    `remote`: it can speak to an endpoint, and takes `--url`.
    """
    shared_flags = (*SHARED, REMOTE) if remote else SHARED

    def register(function: Command) -> Command:
        def call(**given: Any) -> None:
            shared = {parameter.name: given.pop(parameter.name) for parameter in shared_flags}
            _run(function, Options(**shared), given)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters = [*own, *shared_flags]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__doc__ = _BREAK.sub(" ", inspect.getdoc(function) or "")  # the window breaks lines, not the source
        app.command(name)(call)
        return function

    return register


def _run(function: Command, options: Options, own: dict[str, Any]) -> None:
    """Call a command and end as its result or its error says."""
    log_to_stderr(verbose=options.verbose)
    if not options.verbose:
        sys.excepthook = partial(one_line, as_json=options.json)
    try:
        code = function(options, **own) or Exit.OK
        sys.stdout.flush()
    except FarmError as error:
        if options.verbose:
            traceback.print_exc()
        print_error(error.code, error.message, as_json=options.json)
        code = exit_code(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in RENDERING:
            raise
        message = (
            f"this needs {error.name}, which a client's installation leaves out; install the whole farm with "
            "pip install 'diffusion-farm[farm]', or name a farm's endpoint with FARM_URL"
        )
        print_error(SettingsError.code, message, as_json=options.json)
        code = Exit.INPUT
    except KeyboardInterrupt as stop:
        print_error("interrupted", f"interrupted{': ' if str(stop) else ''}{stop}", as_json=options.json)
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does: end quietly, and let nothing try to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.BROKEN_PIPE
    raise typer.Exit(int(code))


def one_line(kind: type[BaseException], error: BaseException, _trace: object, *, as_json: bool = False) -> None:
    """Show an error that should not be as one line; Python's own exit code for it is 1."""
    message = f"unexpected {kind.__name__}: {error}; run again with -v for the traceback"
    print_error("unexpected", message, as_json=as_json)
