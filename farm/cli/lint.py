"""`farm lint`: what a manifest's prompts are advised against; needs neither the model's weights nor a device."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.advice import warn, warning_records
from farm.cli.exits import Exit
from farm.cli.options import Options, command
from farm.cli.planning import load
from farm.cli.terminal import note, print_json
from farm.cli.wording import count
from farm.errors import FarmError

LOOKS = 10_000


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "lint")(lint)


def lint(
    options: Options,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML file; - reads it from stdin.")],
    strict: Annotated[
        bool, typer.Option("--strict", help=f"Exit with {int(Exit.WARNED)} where more than the licence is warned of.")
    ] = False,
) -> Exit:
    """Show what is likely to go wrong with a manifest's prompts, without rendering anything.

    Structured prompts are read for broken and unknown tags, genders and poses that the model does not know, crowded
    characters and names that stand twice; all prompts for brands and for their length.
    """
    from farm.advice import prompt_advice
    from farm.modelcard import find_card
    from farm.prompts import sample
    from farm.request import placed, wish_of
    from farm.storage.opening import open_store

    settings = options.settings()
    loaded = load(manifest, settings)
    try:
        card = find_card(loaded.manifest.model, settings)
    except FarmError as exc:
        raise type(exc)(f"{loaded.document.where(('model',))}: {exc.message}") from exc
    wish = wish_of(loaded, card)
    with placed(loaded.document):
        samples = sample(
            loaded.manifest,
            card=card,
            params=wish.params,
            points=wish.points,
            open_store=partial(open_store, settings=settings),
            most=LOOKS,
        )
    found = wish.warnings + prompt_advice(samples, card=card, document=loaded.document)
    if options.json:
        looked_at = {"looked_at": len(samples.prompts), "whole": samples.whole}
        print_json({"job": loaded.manifest.name, "model": card.name, **looked_at, "warnings": warning_records(found)})
    else:
        warn(found, most=None)
        looks = count(len(samples.prompts), "different prompt")
        note(f"looked at {'' if samples.whole else 'the first '}{looks}: {count(len(found), 'warning')}")
    return Exit.WARNED if strict and any(one.code != "licence" for one in found) else Exit.OK
