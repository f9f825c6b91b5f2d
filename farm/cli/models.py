"""`farm models`: what models there are, their weights fetched ahead, and their files looked over."""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from farm.cli import remote
from farm.cli.exits import Exit
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, print_table, say
from farm.cli.wording import count, printable, size

if TYPE_CHECKING:
    from farm.modelcard import ModelCard
    from farm.settings import Settings
    from farm.weightcheck import PartReport

EVERY_S = 0.5
PLAIN_EVERY_S = 10.0


class _Models(TyperGroup):
    """Takes `farm models [NAME]` for `farm models show [NAME]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["show", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    models = typer.Typer(
        name="models",
        cls=_Models,
        help="List the models that a manifest may name; `farm models NAME` shows one.",
        add_completion=False,
    )
    command(models, "list", remote=True)(list_)
    command(models, "show", remote=True)(show)
    command(models, "pull")(pull)
    command(models, "check")(check)
    app.add_typer(models)


def list_(options: Options) -> Exit:
    """List the models that a manifest may name.

    With an address (FARM_URL), that farm's models and how soon each could draw.
    """
    return show(options, None)


def show(
    options: Options,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model; all of them where left out.")] = None,
) -> Exit:
    """Show one model's limits, defaults, presets and negative prompts; without a name list all.

    With an address (FARM_URL), that farm's models and how soon each could draw.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_models(options, farm, name)
    from farm.doctor import weights_of

    settings = options.settings()
    cards, bad = _cards(name, settings)
    if options.json:
        records: list[dict[str, Any]] = [
            {**card.model_dump(mode="json"), "weights": weights_of(card, settings), **_code_record(card, settings)}
            for card in cards
        ]
        faults = [{"name": stem, "fault": fault} for stem, fault in bad.items()]
        print_json(records[0] if name else {"models": records} | ({"faults": faults} if faults else {}))
    elif name:
        _show(cards[0], settings, weights_of(cards[0], settings))
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
                weights_of(card, settings),
            )
            for card in cards
        ]
        print_table(columns, rows, right=("size", "steps"))
        for fault in bad.values():
            say(f"FAULT {printable(fault)}")
    return Exit.INPUT if bad else Exit.OK


def pull(options: Options, name: Annotated[str, typer.Argument(metavar="NAME", help="A model.")]) -> Exit:
    """Fetch all weights of a model to this machine: from the hub into its cache, from a bucket into FARM_WEIGHTS.

    What is here already is not fetched again; a pull that was ended goes on.
    """
    from farm.modelcard import find_card
    from farm.weights import locate_source, sources_of

    settings = options.settings()
    card = find_card(name, settings)
    folders = {}
    for part, source in sources_of(card).items():
        line = _Line(f"{card.name}, {part}")
        folders[part] = str(locate_source(card, source, settings=settings, report=line.show))
        line.end()
        if not options.json:
            say(f"{part:<10} {printable(folders[part])}")
    if options.json:
        print_json({"name": card.name, "folders": folders})
    return Exit.OK


def check(
    options: Options,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One model; all that are here where left out.")
    ] = None,
) -> Exit:
    """Look over the files of weights by their headers: cut off, missing, pickled; what each part weighs; code against pins."""
    from farm.weightcheck import PartReport
    from farm.weights import are_here

    settings = options.settings()
    cards, bad = _cards(name, settings)
    records: list[dict[str, Any]] = []
    faults = len(bad)
    for stem, fault in bad.items():
        part = PartReport("card", 0, 0, (), (fault,))
        records.append({"name": stem, "weights": "unknown", "parts": [dataclasses.asdict(part)]})
        if not options.json:
            say(printable(stem))
            say(f"  FAULT {printable(fault)}")
    for card in cards:
        if not name and not are_here(card, settings=settings):
            records.append({"name": card.name, "weights": "not here", "parts": []})
            if not options.json:
                say(f"{card.name}: not here; farm models pull {card.name} fetches it")
            continue
        parts = _checked(card, settings, quiet=options.json)
        faults += sum(len(part.faults) for part in parts)
        looked = [dataclasses.asdict(part) for part in parts]
        records.append({"name": card.name, "weights": "here", "parts": looked, **_code_record(card, settings)})
    if options.json:
        print_json({"sound": not faults, "models": records})
    elif faults:
        note(f"{count(faults, 'fault')}; pull the model again, or mend its card")
    return Exit.DIFFERENT if faults else Exit.OK


def _cards(name: str | None, settings: "Settings") -> "tuple[list[ModelCard], dict[str, str]]":
    """Return one card, or all of them, and by name what is wrong with those that are."""
    from farm.modelcard import ModelCard, find_card, look_through

    if name:
        return [find_card(name, settings)], {}
    found = look_through(settings)
    cards = [card for card in found.values() if isinstance(card, ModelCard)]
    return cards, {stem: fault.message for stem, fault in found.items() if not isinstance(fault, ModelCard)}


def _checked(card: "ModelCard", settings: "Settings", *, quiet: bool) -> "list[PartReport]":
    from farm.weightcheck import check_weights

    parts = []
    if not quiet:
        say(card.name)
    for part in check_weights(card, settings):
        parts.append(part)
        if quiet:
            continue
        kinds = ", ".join(f"{_weights(elements)} {printable(dtype)}" for dtype, elements in part.dtypes) or "nothing"
        if part.name == "code":
            kinds = _permission(card, settings)
        say(f"  {part.name:<16} {size(part.size_bytes):>8}  {count(part.files, 'file')}  {kinds}")
        for fault in part.faults:
            say(f"  FAULT {printable(fault)}")
    return parts


def _permission(card: "ModelCard", settings: "Settings") -> str:
    """The digest of the code that a card runs, and whether this machine allows it."""
    from farm.pinnedcode import digest_of, how_to_allow, is_allowed

    allowed = is_allowed(card, settings)
    said = "allowed here" if allowed else f"not allowed here; {how_to_allow(card, settings)} allows it, once it is read"
    return f"{digest_of(card)}, {said}"


def _code_record(card: "ModelCard", settings: "Settings") -> dict[str, Any]:
    from farm.pinnedcode import digest_of, is_allowed

    return {"code_digest": digest_of(card), "code_allowed": is_allowed(card, settings)} if card.code else {}


def _weights(number: int) -> str:
    """So many weights, as `6.2 B` or `81 M`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return str(number)


class _Line:
    """A download's progress on stderr: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str):
        self._what = what
        self._live = sys.stderr.isatty()
        self._shown_at = 0.0
        self._began = False

    def show(self, done: int, total: int) -> None:
        """Show how many bytes are here."""
        now = time.monotonic()
        if self._began and now - self._shown_at < (EVERY_S if self._live else PLAIN_EVERY_S) and done < total:
            return
        self._shown_at, self._began = now, True
        text = f"{self._what}: {size(done)} of {size(total)}"
        if self._live:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        else:
            note(text)

    def end(self) -> None:
        """Leave the line as it stands."""
        if self._live and self._began:
            note("")


def _show(card: "ModelCard", settings: "Settings", weights: str) -> None:
    limits, defaults = card.limits, card.defaults
    say(f"{card.name}: {card.title}")
    say(f"  family     {card.family}")
    say(f"  source     {card.source.given or 'none'} ({weights})")
    if card.denoiser is not None:
        say(f"  denoiser   {card.denoiser.given}, {card.denoiser.file}")
    if card.decoder is not None:
        say(f"  decoder    {card.decoder.given}")
    for adapter in card.adapters:
        say(f"  adapter    {adapter.name}, weight {adapter.weight:g}: {adapter.given}, {adapter.file}")
    if card.scheduler is not None:
        options = "".join(f", {name} {value}" for name, value in card.scheduler.options.items())
        say(f"  scheduler  {card.scheduler.name}{options}")
    for part, how in card.quantise.items():
        say(f"  quantised  {part}: {how}")
    for device, accelerated in card.acceleration.items():
        say(f"  quicker    {device}: {accelerated}")
    for option, value in card.options.items():
        say(f"  option     {option}: {value}")
    if card.code:
        say(f"  code       {', '.join(sorted(card.code))}")
        say(f"  digest     {_permission(card, settings)}")
    say(f"  licence    {card.licence}")
    if card.licence_warning is not None:
        say(f"  warning    {card.licence}: {card.licence_warning}")
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
        values = overrides.model_dump(exclude={"warning"}, exclude_none=True)
        say(
            f"  preset     {preset}: {', '.join(f'{name} {value}' for name, value in values.items()) or 'the defaults'}"
        )
        if overrides.warning is not None:
            say(f"  warning    {preset}: {overrides.warning}")
    for name, text in card.negative_prompts.items():
        say(f"  negative   @{name}: {text.strip() or 'a blank'}")
