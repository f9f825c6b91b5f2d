"""`farm models`, `farm doctor`: what this machine has, and whether it can render."""

import dataclasses
from typing import Annotated, Any

import typer

from farm.cli import remote
from farm.cli.exits import Exit
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, print_table, say

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "models", remote=True)(models)
    command(app, "doctor")(doctor)


def models(
    options: Options,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model; all of them where left out.")] = None,
) -> Exit:
    """List the models that a manifest may name.

    With a name, that model's limits, defaults and presets. With an address (FARM_URL), that farm's models and how soon each could
    draw.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_models(options, farm, name)
    from farm.doctor import weights_of
    from farm.modelcard import find_card, list_cards

    settings = options.settings()
    cards = [find_card(name, settings)] if name else list_cards(settings)
    if options.json:
        records: list[dict[str, Any]] = [
            {**card.model_dump(mode="json"), "weights": weights_of(card)} for card in cards
        ]
        print_json(records[0] if name else {"models": records})
    elif name:
        _show(cards[0])
    else:
        columns = ("name", "title", "family", "size", "steps", "licence", "weights")
        rows = [
            (
                card.name,
                card.title,
                card.family,
                f"{card.defaults.width}×{card.defaults.height}",
                str(card.defaults.num_inference_steps),
                card.licence,
                weights_of(card),
            )
            for card in cards
        ]
        print_table(columns, rows, right=("size", "steps"))
    return Exit.OK


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


def _show(card: Any) -> None:
    from farm.doctor import weights_of

    limits, defaults = card.limits, card.defaults
    say(f"{card.name}: {card.title}")
    say(f"  family     {card.family}")
    say(f"  source     {card.source.hub or card.source.path or 'none'} ({weights_of(card)})")
    say(f"  licence    {card.licence}")
    say(
        f"  defaults   {defaults.width}×{defaults.height}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}"
    )
    if limits.sizes:
        say("  sizes      " + ", ".join(f"{width}×{height}" for width, height in limits.sizes))
    else:
        say(f"  sizes      sides {limits.min_px} to {limits.max_px}, multiples of {limits.multiple_of}")
    say(f"  steps      up to {card.max_steps}")
    for kind, dtypes in card.dtypes.items():
        say(f"  {kind:<10} {', '.join(dtypes)}; {card.batch[kind]} images a batch")
    for preset, overrides in card.presets.items():
        said = ", ".join(f"{name} {value}" for name, value in overrides if value is not None)
        say(f"  preset     {preset}: {said}")
