"""`farm doctor`: whether this machine can render."""

import dataclasses
from typing import Annotated

import typer

from farm.cli.exits import Exit
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, say

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "doctor")(doctor)


def doctor(
    options: Options,
    render: Annotated[bool, typer.Option("--render/--no-render", help="Make a test picture too.")] = True,
) -> Exit:
    """See whether this machine and the store can render.

    Each line says what was found and what to do next.
    """
    from farm.doctor import Check, examine

    settings = options.settings()
    checks: list[Check] = []
    for check in examine(settings, render=render):
        checks.append(check)
        if not options.json:
            advice = f"; {check.next_step}" if check.next_step else ""
            say(f"{MARKS[check.status]}  {check.name:<12} {check.found}{advice}")
    failed = [check for check in checks if check.status == "fail"]
    if options.json:
        print_json({"sound": not failed, "checks": [dataclasses.asdict(check) for check in checks]})
    elif failed:
        note(f"{len(failed)} of {len(checks)} checks failed")
    return Exit.DIFFERENT if failed else Exit.OK
