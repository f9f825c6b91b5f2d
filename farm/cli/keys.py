"""`farm keys create|list|revoke`: who may use the endpoint."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.exits import Exit
from farm.cli.moment import user_name
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, print_table, say
from farm.cli.wording import printable
from farm.errors import RequestError

if TYPE_CHECKING:
    from farm.keys import Key, Scope

WITHOUT = "-"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    keys = typer.Typer(
        name="keys",
        help="Make, list and revoke keys of the endpoint.",
        no_args_is_help=True,
        add_completion=False,
    )
    command(keys, "create")(create)
    command(keys, "list")(show)
    command(keys, "revoke")(revoke)
    app.add_typer(keys)


def create(
    options: Options,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="NAME", help="Whose jobs are made with it; yours where left out.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", metavar="SCOPE", help="read, render or admin; each has those before it. render."),
    ] = None,
    days: Annotated[
        float | None, typer.Option("--days", min=0.001, max=36_500, metavar="N", help="Days until it expires.")
    ] = None,
    per_minute: Annotated[
        int | None, typer.Option("--images-per-minute", min=1, metavar="N", help="Limit of images a minute.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option("--images-at-once", min=1, metavar="N", help="Limit of images in hand at a time.")
    ] = None,
    per_day: Annotated[
        int | None, typer.Option("--images-per-day", min=1, metavar="N", help="Limit of images a day, UTC.")
    ] = None,
    purpose: Annotated[str, typer.Option("--note", metavar="TEXT", help="What it is for.")] = "",
) -> Exit:
    """Make a key, and show it this once.

    The store keeps a hash of it alone. Requests carry it as Authorization: Bearer KEY, commands as FARM_KEY.
    """
    from farm.keys import create_key
    from farm.portion import Allowance

    now = datetime.now(UTC)
    settings = options.settings()
    made = create_key(
        options.open_store(settings),
        owner=owner if owner is not None else settings.owner or user_name(),
        scopes=_scopes(scope or ["render"]),
        at=now,
        allowance=Allowance(images_per_minute=per_minute, images_at_once=at_once, images_per_day=per_day),
        expires_at=now + timedelta(days=days) if days is not None else None,
        note=purpose,
    )
    if options.json:
        print_json({"key": made.text, **_record(made.key, now)})
        return Exit.OK
    say(made.text)
    until = f" until {made.key.expires_at}" if made.key.expires_at else ""
    note(
        f"key {made.key.id} of {printable(made.key.owner)} may {', '.join(made.key.scopes)}{until}; it is shown this once, "
        f"farm keys revoke {made.key.id} ends it"
    )
    return Exit.OK


def show(options: Options) -> Exit:
    """List keys: whose they are, what they may, how they stand."""
    from farm.keys import list_keys

    now = datetime.now(UTC)
    keys = sorted(list_keys(options.open_store()), key=lambda key: (key.created_at, key.id))
    if options.json:
        print_json({"keys": [_record(key, now) for key in keys]})
    elif not keys:
        note("there are no keys; farm keys create makes one")
    else:
        columns = ("id", "owner", "scopes", "state", "expires", "a minute", "at once", "a day", "note")
        print_table(columns, [_row(key, now) for key in keys], right=("a minute", "at once", "a day"))
    return Exit.OK


def revoke(
    options: Options,
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as farm keys list shows it.")],
) -> Exit:
    """Let a key in no more.

    Its jobs and images stay. A farm that runs feels it within seconds.
    """
    from farm.keys import CACHE_S, revoke_key

    revoked = revoke_key(options.open_store(), key, at=datetime.now(UTC))
    if options.json:
        print_json(_record(revoked, datetime.now(UTC)))
    else:
        note(
            f"key {revoked.id} of {printable(revoked.owner)} is revoked; a farm that runs feels it within {CACHE_S:g} s"
        )
    return Exit.OK


def _scopes(given: list[str]) -> list["Scope"]:
    from farm.keys import SCOPES

    wanted = {word.strip() for text in given for word in text.split(",")}
    if unknown := sorted(wanted - set(SCOPES)):
        raise RequestError(f"no scope is called {unknown[0]!r}; there are {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in wanted]


def _record(key: "Key", now: datetime) -> dict[str, Any]:
    return {**key.model_dump(mode="json", exclude={"version", "secret_sha256"}), "state": key.state(now)}


def _row(key: "Key", now: datetime) -> tuple[str, ...]:
    allowance = key.allowance
    limits = (allowance.images_per_minute, allowance.images_at_once, allowance.images_per_day)
    return (
        key.id,
        printable(key.owner),
        ", ".join(key.scopes),
        key.state(now),
        key.expires_at or WITHOUT,
        *(WITHOUT if limit is None else str(limit) for limit in limits),
        printable(key.note),
    )
