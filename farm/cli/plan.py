"""`farm plan`: what a manifest would come to, without writing anything."""

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.advice import warn, warning_records
from farm.cli.exits import Exit
from farm.cli.moment import now_iso
from farm.cli.options import Options, command
from farm.cli.planning import read_request
from farm.cli.render import Renderers
from farm.cli.terminal import note, print_json, say
from farm.cli.wording import count, cut, duration, gpu_hours, size
from farm.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.devices import DeviceInfo
    from farm.fitting import Fit
    from farm.ledger import Ledger
    from farm.outlook import Outlook
    from farm.plan import Plan
    from farm.settings import Settings
    from farm.submission import Draft, Request

MOST_GIB = 10_000
STATES = {
    "new": "a new job",
    "resume": "the job exists, planned from just this; farm render goes on with it",
    "appended": "the job exists and has fewer rows; farm render --append renders those added",
    "changed": "the job exists and was planned from something else; farm render refuses it",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "plan")(plan)


def plan(
    options: Options,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML file that says what to render.")],
    renderers: Renderers = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:GIB", help="Ask about a GPU that is not here, as 'RTX 4060 Ti:16'; may be repeated."
        ),
    ] = None,
    vram: Annotated[
        float | None, typer.Option(metavar="GIB", help="GPU memory one renderer may use, over FARM_VRAM_GIB.")
    ] = None,
) -> Exit:
    """Show what a manifest would come to; nothing is written.

    Counts, shards, first prompts, size, where the model's parts lie on each GPU, the time with where it is known from, and
    whether it keeps its limits.
    """
    from farm.devices import local_device
    from farm.fitting import asked_device
    from farm.submission import draft

    if vram is not None and not 1 <= vram < MOST_GIB:
        raise SettingsError(f"--vram {vram:g}: must be 1 GiB or more, and less than {MOST_GIB:,}")
    settings = options.settings(renderers=renderers, vram_gib=vram)
    pool = asked_device(device or (), vram_gib=vram, here=local_device())
    request = read_request(manifest, settings, device=pool)
    ledger = options.open_ledger(settings)
    placements = _placements(request, settings, ledger, pool=pool, elsewhere=bool(device))
    able = _able(pool, placements or ())
    if able != pool:
        request = read_request(manifest, settings, device=able)  # time is reckoned on those that can draw it
    found = draft(request, ledger, now=now_iso())
    warn(found.warnings)
    if options.json:
        print_json(_record(request, found) | {"placements": _placement_records(placements)})
    else:
        _show(request, found, placements)
    return Exit.OK


def _able(pool: "DeviceInfo", placements: "tuple[Fit, ...]") -> "DeviceInfo":
    """A pool without the GPUs that cannot draw the model. Raises PlacementError where none can."""
    from dataclasses import replace

    from farm.errors import PlacementError

    refused = {fit.device: fit.refusal or "" for fit in placements if fit.placement is None}
    if refused and len(refused) == len(placements):
        raise PlacementError(next(iter(refused.values())))
    able = tuple(gpu for gpu in pool.gpus if gpu.name not in refused)
    return replace(pool, name=able[0].name, gpus=able) if refused else pool


def _placements(
    request: "Request", settings: "Settings", ledger: "Ledger", *, pool: "DeviceInfo", elsewhere: bool
) -> "tuple[Fit, ...] | None":
    """How the model lies on each device; empty for a family without weights, None where those are not here yet."""
    from farm.devices import host_memory
    from farm.fitting import fits

    if request.card.family == "sleep":
        return ()
    host = None if elsewhere else host_memory()
    return fits(
        request.card,
        request.numerics,
        device=pool,
        settings=settings,
        host=host,
        profile=lambda name: ledger.profile(
            request.card.name, name, request.card.accelerated_on(request.numerics.device)
        ),
    )


def _show(request: "Request", found: "Draft", placements: "tuple[Fit, ...] | None") -> None:
    plan = found.plan
    params = plan.params
    say(f"{plan.job}: {count(plan.images, 'image')} in {count(plan.shards, 'shard')} of up to {plan.shard_images:,}")
    say(f"  state      {STATES[found.state]}")
    for change in found.changes:
        say(f"             {change}")
    say(f"  model      {plan.card.name}: {plan.card.title}")
    if weights := _weights(plan):
        say(f"             {weights}")
    points = f" × {count(len(plan.sweep), 'sweep point')}" if len(plan.sweep) > 1 else ""
    say(f"  images     {count(plan.prompts.rows, 'prompt')}{points} × {count(plan.seeds.count, 'seed')}")
    say("  sizes      " + ", ".join(f"{w}×{h}: {images:,}" for (w, h), images in found.sizes.items()))
    say(f"  params     {params.num_inference_steps} steps, guidance {params.guidance_scale:g}")
    numerics = plan.numerics
    say(f"  numerics   {numerics.device}, {numerics.dtype}, batches of {numerics.batch}")
    for line in _placement_lines(plan, placements):
        say(line)
    if plan.pilot is not None:
        others = plan.images - plan.pilot
        say(f"  pilot      {count(plan.pilot, 'image')} first, spread over the job; {others:,} wait for farm approve")
    say(f"  time       {_time(request, found)}")
    for line in _limits(found.outlook, request.renderers):
        say(line)
    if found.size_bytes is None:
        say("  size       unknown until a run of this job has ended")
    else:
        say(f"  size       about {size(found.size_bytes)}, as an earlier run of the job")
    if found.first:
        anew = "; what is random is drawn anew by farm render" if found.drawn else ""
        say(f"  first      image, seed, prompt{anew}")
        for spec in found.first:
            swept = "".join(f", {name} {getattr(spec.params, name)}" for name in plan.manifest.sweep)
            say(f"             {spec.index:5} {spec.seed:10}  {cut(spec.prompt, 100)}{swept}")
    if found.state == "changed":
        note("give the manifest a new name, or put the old values back")


def _quantised(plan: "Plan") -> dict[str, str]:
    """Parts that are quantised as they load, and how: on a GPU alone."""
    return {} if plan.numerics.device == "cpu" else {str(part): how for part, how in plan.card.quantise.items()}


def _weights(plan: "Plan") -> str:
    """The denoiser's own file, and what is quantised; empty where the model is as its source has it."""
    own = [f"denoiser from {plan.card.denoiser.file}"] if plan.card.denoiser else []
    called = {"encoder": "text encoder"}
    return ", ".join((*own, *(f"{called.get(part, part)} as {how}" for part, how in _quantised(plan).items())))


def _placement_lines(plan: "Plan", placements: "tuple[Fit, ...] | None") -> list[str]:
    """Where the model's parts lie and for how long; with several kinds of device each, and which of them cannot draw it."""
    if placements is None:
        return [f"  placement  unknown: the weights are not here yet; farm models pull {plan.card.name} brings them"]
    lines = []
    for fit in placements:
        what = fit.placement.explained if fit.placement else f"cannot draw it: {fit.refusal}"
        where = f"{fit.device}: " if len(placements) == 1 else f"{fit.count} × {fit.device}: "
        lines.append(f"  placement  {where}{what}")
        lines += [f"             {line}" for line in _how_long(plan, fit)]
        lines += [
            f"             with {change} in the card, which changes pixels: {placed.explained}"
            for change, placed in fit.sooner
        ]
    return lines


def _how_long(plan: "Plan", fit: "Fit") -> "Iterator[str]":
    """For how long each part is in, as it was measured there; on average over a sweep."""
    from farm.modelcard import merged

    if fit.placement is None:
        return
    phased, stages = fit.placement.encodes_ahead, fit.stages
    if fit.placement.streamed:
        return  # what was measured was so placed elsewhere
    if stages is None or (phased and stages.encoder_in_s is None):
        if phased:
            yield f"for how long each is in: not measured there yet; farm bench {plan.card.name} does"
        return
    points = [merged(plan.params, point) for point in plan.sweep]
    denoise_s, decode_s = (fmean(each) for each in zip(*map(stages.drawing_s, points), strict=True))
    if plan.card.family == "diffusers":  # its pipelines encode, denoise and decode in one call
        yield f"as measured: {duration(denoise_s)} an image"
        return
    drawing = f"denoiser {duration(denoise_s)} and decoder {duration(decode_s)} an image"
    if phased:
        prompts = max(1, min(plan.shard_images, plan.images) // (plan.seeds.count * len(plan.sweep)))
        encoder = (
            f"encoder in for {duration(stages.encoder_s(points[0], prompts))} a shard of {count(prompts, 'prompt')}"
        )
        yield f"as measured: {encoder}, denoiser back after {duration(stages.denoiser_in_s or 0.0)}; {drawing}"
    else:
        yield f"as measured: encoder {duration(stages.encode_s)} a prompt, {drawing}"


def _placement_records(placements: "tuple[Fit, ...] | None") -> list[dict[str, Any]] | None:
    if placements is None:
        return None
    return [
        {
            "device": fit.device,
            "count": fit.count,
            "layout": fit.placement.layout if fit.placement else None,
            "peak_gib": round(fit.placement.peak_gib, 2) if fit.placement else None,
            "host_gib": round(fit.placement.host_gib, 2) if fit.placement else None,
            "explained": fit.placement.explained if fit.placement else fit.refusal,
            "sooner": {change: placed.explained for change, placed in fit.sooner},
            "stages": fit.stages and fit.stages.model_dump(mode="json"),
        }
        for fit in placements
    ]


def _time(request: "Request", found: "Draft") -> str:
    if found.seconds is None:
        return "unknown: nothing of the kind was rendered on this device yet"
    said = f"about {duration(found.seconds)} on {count(request.renderers, 'renderer')}"
    how = "measured on" if found.speed.source == "measured" else "estimated for"
    devices = " and ".join(dict.fromkeys((request.device, *request.others)))
    return f"{said}, {duration(found.speed.seconds_per_image or 0.0)} an image ({how} {devices})"


def _limits(outlook: "Outlook", renderers: int) -> list[str]:
    """A line for each limit of the job: whether it will be kept."""
    limits, lines = outlook.limits, []
    if outlook.seconds_left is not None:
        lines.append(f"  finish by  {limits.finish_by}, {_in_time(outlook, renderers)}")
    if limits.gpu_hours is not None:
        needed = outlook.gpu_hours_needed
        said = "unknown how many are needed" if needed is None else f"about {float(f'{needed:.2g}'):,.10g} needed"
        over = ", so it stops when they are spent" if needed is not None and needed > limits.gpu_hours else ""
        lines.append(f"  budget     {gpu_hours(limits.gpu_hours)}: {said}{over}")
    if limits.max_images is not None:
        over = ", so it stops before its end" if outlook.images_needed > limits.max_images else ""
        lines.append(f"  budget     {count(limits.max_images, 'image')}: {outlook.images_needed:,} needed{over}")
    return lines


def _in_time(outlook: "Outlook", renderers: int) -> str:
    left, needed = outlook.seconds_left or 0.0, outlook.seconds_needed
    if left <= 0:
        return "which has passed"
    said = f"in {duration(left)}: "
    if needed is None:
        return f"{said}unknown whether it is met"
    takes = f"{duration(needed)} on {count(renderers, 'renderer')}"
    if outlook.in_time:
        return f"{said}met, with {takes}"
    enough = outlook.renderers_needed
    more = "no number of them is enough" if enough is None else f"{enough:,} are enough"
    return f"{said}not met, with {takes}; {more}"


def _record(request: "Request", found: "Draft") -> dict[str, Any]:
    plan = found.plan
    return {
        "job": plan.job,
        "state": found.state,
        "changes": list(found.changes),
        "model": plan.card.name,
        "denoiser_file": plan.card.denoiser.file if plan.card.denoiser else None,
        "quantised": _quantised(plan),
        "images": plan.images,
        "prompts": plan.prompts.rows,
        "sweep_points": len(plan.sweep),
        "seeds": plan.seeds.count,
        "shards": plan.shards,
        "shard_images": plan.shard_images,
        "pilot": plan.pilot,
        "sizes": [{"width": w, "height": h, "images": images} for (w, h), images in found.sizes.items()],
        "params": plan.params.model_dump(),
        "numerics": plan.numerics.model_dump(),
        "renderers": request.renderers,
        "device": request.device,
        "seconds": found.seconds,
        "seconds_per_image": found.speed.seconds_per_image,
        "speed_source": found.speed.source,
        "limits": {
            **dataclasses.asdict(found.outlook.limits),
            "in_time": found.outlook.in_time,
            "seconds_left": found.outlook.seconds_left,
            "seconds_needed": found.outlook.seconds_needed,
            "renderers_needed": found.outlook.renderers_needed,
            "within_budget": found.outlook.within_budget,
            "gpu_hours_needed": found.outlook.gpu_hours_needed,
            "images_needed": found.outlook.images_needed,
        },
        "size_bytes": found.size_bytes,
        "drawn_anew": found.drawn,
        "warnings": warning_records(found.warnings),
        "first": [
            {"index": spec.index, "key": spec.key, "seed": spec.seed, "prompt": spec.prompt, **spec.params.model_dump()}
            for spec in found.first
        ],
    }
