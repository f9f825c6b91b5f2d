"""`farm bench`: how fast a model draws on this machine, in how much memory, and how its pictures change with steps."""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from farm.cli.exits import Exit, exit_code
from farm.cli.moment import now_iso
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_error, print_json, say
from farm.cli.wording import cut, duration
from farm.errors import InputError, StoreError

if TYPE_CHECKING:
    from farm.bench.acceleration import Way
    from farm.bench.figures import Measured, Part
    from farm.bench.model import Wish
    from farm.bench.report import Setup
    from farm.devices import DeviceInfo
    from farm.engine import Picture
    from farm.ledger import Ledger, Profile
    from farm.modelcard import ModelCard, RenderParams
    from farm.plan import Numerics

FOLDER = Path("farm-bench")
MOST_IMAGES = 200
"""Of a round: the pictures of the last one stay in memory until the report is written."""
MOST_ROUNDS = 100
MOST_BATCH = 256
MOST_NUMBER = 999_999
"""Of steps and of a side: far above what any card takes, which says its own limit."""
_T = TypeVar("_T")


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "bench")(bench)


def bench(
    options: Options,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model card's name; see farm models.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to draw, in turn; may be given again.")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", metavar="NAME", help="A preset of the card.")] = None,
    images: Annotated[int, typer.Option("--images", metavar="N", help=f"Pictures a round, {MOST_IMAGES} at most.")] = 5,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", metavar="N", help=f"The first, and each one's first picture, warm up; {MOST_ROUNDS} at most."
        ),
    ] = 3,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N,N", help="Draw the same pictures with so many steps too.")
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", metavar="WxH,WxH", help="Measure these sizes too.")] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", metavar="N,N", help=f"Measure so many images drawn together too, {MOST_BATCH} at most."
        ),
    ] = None,
    accelerate: Annotated[
        list[str] | None,
        typer.Option(
            "--accelerate",
            metavar="HOW",
            help="Measure the card accelerated like this too, as compile,attention=flash or none; may be given again.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the first picture.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes; a new folder.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Store what farm plan estimates time by.")
    ] = True,
) -> Exit:
    """Measure a model on this machine's first device: cold start, pictures in a row, memory by phase.

    The engine draws alone, without Ray and without a store. Leaves a report with plots, a contact sheet and the pictures.
    Nothing else should use the device meanwhile.
    """
    from farm.bench.acceleration import Kept, accelerated, measure_ways
    from farm.bench.environment import environment
    from farm.bench.folder import RECORD, BenchFolder
    from farm.bench.model import SAMPLE_S, Wish, measure
    from farm.bench.report import Setup, profile_of, record_of
    from farm.bench.subjects import prompts_for
    from farm.devices import local_device, number_as_nvml, numerics_for
    from farm.engine import EmbeddingCache, Engine
    from farm.manifest import MAX_SEED
    from farm.modelcard import find_card
    from farm.weights import pinned

    for flag, value, least, most in (
        ("--images", images, 1, MOST_IMAGES),
        ("--rounds", rounds, 1, MOST_ROUNDS),
        ("--seed", seed, 0, MAX_SEED),
    ):
        if not least <= value <= most:
            raise InputError(f"{flag} {_short(value)}: must be {least} to {most}")
    settings = options.settings()
    card = pinned(find_card(model, settings), settings=settings)
    params = _params(card, preset)
    number_as_nvml()
    device = local_device()
    numerics = numerics_for(card, device=device, renderers=1)
    wish = Wish(
        prompts=tuple(prompt or prompts_for(card)),
        params=params,
        batch=numerics.batch,
        seed=seed,
        images=images,
        rounds=rounds,
        steps=_listed("--steps", steps, _positive),
        sizes=_listed("--sizes", sizes, _size),
        batches=_listed("--batch", batch, _together),
    )
    _check(card, wish)
    asked = [accelerated(card, text, device=device.kind) for text in accelerate or ()]
    others = {other.accelerated_on(device.kind): other for other in asked}
    if (own_way := card.accelerated_on(device.kind)) in others:
        note(f"note: {card.name} is accelerated like that already ({own_way}): it is measured anyhow")
        del others[own_way]
    ways = [(other, numerics_for(other, device=device, renderers=1)) for other in others.values()]
    measured_at = now_iso()
    stamp = measured_at[:19].replace("-", "").replace(":", "").replace("T", "-")
    folder = BenchFolder(out if out is not None else FOLDER / f"{card.name}-{stamp}")
    on_gpu = device.kind == "cuda"
    setup = Setup(
        card=card,
        numerics=numerics,
        device=device.name,
        vram_gib=settings.vram_gib,
        prompts=wish.prompts,
        negative_prompt=params.negative_prompt if params.guidance_scale > 0 else "",
        seed=seed,
        images=images,
        rounds=rounds,
        interval_s=SAMPLE_S,
        held="what torch's allocator has reserved" if on_gpu else "resident memory of the process",
        measured_at=measured_at,
        environment=environment(),
        command=shlex.join(["farm", *sys.argv[1:]]),
    )
    with folder.claimed():
        ledger = options.open_ledger(settings) if profile else None
        if ledger is not None:
            ledger.store.probe()

        def open_engine(card: "ModelCard", numerics: "Numerics") -> Engine:
            return Engine(card, numerics, "cuda:0" if on_gpu else "cpu", settings.vram_gib, cache=EmbeddingCache(0))

        def keep(part: "Part", picture: "Picture") -> None:
            folder.keep(part, picture)
            own.keep(part, picture)

        own, say_how = Kept(), _quiet if options.json else note
        engine = open_engine(card, numerics)
        try:
            measured = measure(engine, wish, start_s=_age_s(), keep=keep, say=say_how)
        finally:
            engine.unload()
        folder.write(setup, measured)
    refused = _store(ledger, [profile_of(setup, measured)])
    found = []
    if ways:
        found = measure_ways(
            ways,
            wish,
            as_it_is=(card, numerics),
            base=measured,
            own=own.pixels,
            open_engine=open_engine,
            say=say_how,
        )
        folder.write(setup, measured, found)
        others_found = [
            profile_of(replace(setup, card=way.card, numerics=way.numerics), way.measured)
            for way in found[: len(ways)]
            if way.measured
        ]
        refused = refused or _store(ledger, others_found)
    stored = ledger is not None and refused is None
    if options.json:
        print_json({**record_of(setup, measured, found), "out": str(folder.path), "profile_stored": stored})
    else:
        _show(setup, measured, device)
        for way in found:
            _show_way(way)
        say(f"  report      {folder.path / 'report.md'}, with sheet.png, plots, pictures/ and {RECORD}")
        if stored and ledger is not None:
            say(f"  profile     in {ledger.store.url}: farm plan estimates by it")
    if refused is None:
        return Exit.OK
    print_error(refused.code, refused.message, as_json=False)  # stdout has the one JSON value already
    note(f"note: farm plan does not learn of this: its profile is not stored; the report lies in {folder.path}")
    return exit_code(refused)


def _store(ledger: "Ledger | None", profiles: "list[Profile]") -> StoreError | None:
    """Store what farm plan estimates by; what the store says where it does not take it."""
    if ledger is None:
        return None
    try:
        for one in profiles:
            ledger.put_profile(one)
    except StoreError as exc:
        return exc
    return None


def _params(card: "ModelCard", preset: str | None) -> "RenderParams":
    from farm.modelcard import ParamOverrides, merged, negative_of
    from farm.yamlfile import did_you_mean, shown

    if preset is not None and preset not in card.presets:
        near = did_you_mean(preset, list(card.presets)) or f"; it has {', '.join(card.presets) or 'none'}"
        raise InputError(f"--preset: {card.name} has no preset {shown(preset)}{near}")
    params = merged(card.defaults, card.presets[preset] if preset is not None else ParamOverrides())
    return params.model_copy(update={"negative_prompt": negative_of(card, params.negative_prompt)})


def _check(card: "ModelCard", wish: "Wish") -> None:
    """Raise InputError where the card cannot draw what is asked for, before anything loads."""
    from farm.modelcard import param_fault

    asked: list[tuple[str, dict[str, int]]] = [("--preset", {})]
    asked += [("--steps", {"num_inference_steps": number}) for number in wish.steps]
    asked += [("--sizes", {"width": width, "height": height}) for width, height in wish.sizes]
    for flag, changes in asked:
        fault = param_fault(card, wish.params.model_copy(update=changes))
        if fault is not None:
            raise InputError(f"{flag}: {fault.text}")


def _show(setup: "Setup", measured: "Measured", device: "DeviceInfo") -> None:
    from farm.bench.figures import spread_of
    from farm.bench.report import three_digits, warm_spreads

    job, cold = measured.job, measured.cold
    say(f"{setup.card.name} on {device.name}, {setup.numerics.dtype}")
    say(f"  picture     {job.width}×{job.height}, {job.num_inference_steps} steps, guidance {job.guidance_scale:g}")
    steps_s = cold.first_step_s + cold.further_steps_s
    say(
        f"  cold start  {duration(cold.seconds)} until the first picture: start {duration(cold.start_s)}, "
        f"load {duration(cold.load_s)}, encode {duration(cold.encode_s)}, denoise {duration(steps_s)} (first step "
        f"{duration(cold.first_step_s)}), decode {duration(cold.decode_s)}"
    )
    warm = warm_spreads(measured)
    whole = warm["whole picture"]
    say(
        f"  a picture   {three_digits(whole.median)} s, p95 {three_digits(whole.p95)} s of {whole.count}: "
        + ", ".join(f"{name} {three_digits(warm[name].median)}" for name in ("encode", "denoise", "decode"))
    )
    say(f"  in a job    {three_digits(job.seconds_per_image)} s an image, in batches of {job.batch}")
    peak = max(measured.peak_gib.values())
    by_phase = ", ".join(f"{phase} {gib:.2f}" for phase, gib in measured.peak_gib.items())
    say(f"  memory      {peak:.2f} GiB at most ({by_phase}), {setup.held}")
    for steps, drawn in measured.by_steps().items():
        median = spread_of([one.seconds for one in drawn]).median
        say(f"  {f'{steps} steps':<10}  {three_digits(median)} s a picture")
    for point in measured.points:
        name = f"{point.width}×{point.height}" if point.part == "size" else f"batch {point.batch}"
        each = "no memory left" if point.failed else f"{three_digits(point.seconds_per_image)} s an image"
        say(f"  {name:<10}  {each}" + ("" if point.failed else f", {point.peak_gib:.2f} GiB"))


def _show_way(way: "Way") -> None:
    if way.measured is None:
        say(f"  {way.name}: cannot be had here: {way.failed}")
        return
    every = len(way.psnr_db)
    apart = "the same pictures" if way.equal == every else f"{way.equal} of {every} pictures the same"
    if way.median_db is not None:
        apart += f", the median one {way.median_db:.1f} dB apart"
    gains = f"{way.picture_gain:.2f}× as fast a picture, {way.job_gain:.2f}× in a job's batches of {way.numerics.batch}"
    say(f"  {way.name}: {gains}; {apart}")


def _listed(flag: str, text: str | None, read: Callable[[str], _T]) -> tuple[_T, ...]:
    """Read `4,8,20`, each value once. Raises InputError."""
    found: dict[_T, None] = {}
    for one in (text or "").split(",") if text is not None else ():
        try:
            found[read(one.strip())] = None
        except ValueError as exc:
            raise InputError(f"{flag} {_short(text)}: {_short(one.strip())!r} is {exc}") from exc
    return tuple(found)


def _positive(text: str, *, most: int = MOST_NUMBER) -> int:
    digits = text.lstrip("0")
    if not (digits and text.isascii() and text.isdigit()):
        raise ValueError("no whole number above 0; write as 4,8,20")
    if len(digits) > len(str(most)) or int(digits) > most:
        raise ValueError(f"more than {most:,}, the most allowed; lower it")
    return int(digits)


def _together(text: str) -> int:
    return _positive(text, most=MOST_BATCH)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("×", "x").partition("x")
    try:
        return _positive(width), _positive(height)
    except ValueError:
        raise ValueError("no size; write as 512x512,1024x1024") from None


def _short(value: object) -> str:
    return cut(str(value), 60)


def _age_s() -> float:
    """Seconds since this process began."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def _quiet(text: str) -> None:
    pass
