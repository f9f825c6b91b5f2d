"""A benchmark of a model as a record and as a page: tables, how it was measured, on what. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from farm.bench.acceleration import Way, picture_s
from farm.bench.figures import Drawn, Measured, Point, Spread, spread_of, thinned
from farm.modelcard import ModelCard
from farm.needs import MEGAPIXEL, decoded_together, denoised_together
from farm.placement import ENCODE_GIB
from farm.plan import Numerics, card_identity, drawing_identity, speed_identity
from farm.records import Profile, ShapeSpeed, Stages, WorkingMemory

SAMPLES_KEPT = 2000
WARM = (("whole picture", "seconds"), ("encode", "encode_s"), ("denoise", "denoise_s"), ("decode", "decode_s"))


@dataclass(frozen=True, slots=True)
class Setup:
    """What was measured, on what and how. `held`: what the memory's figures are of; `environment`: date, machine, versions."""

    card: ModelCard
    numerics: Numerics
    device: str
    vram_gib: float
    prompts: tuple[str, ...]
    negative_prompt: str
    seed: int
    images: int
    rounds: int
    interval_s: float
    held: str
    measured_at: str
    environment: Mapping[str, str | int]
    command: str


def profile_of(setup: Setup, measured: Measured) -> Profile:
    """Return what placement and time estimates are to know: the job's own shape, and the sizes that were swept."""
    job = measured.job
    shapes = {(job.width, job.height): job}
    for point in measured.points:
        if point.part == "size" and point.failed is None:
            shapes.setdefault((point.width, point.height), point)
    return Profile(
        model=setup.card.name,
        device=setup.device,
        acceleration=setup.card.accelerated_on(setup.numerics.device),
        identity=speed_identity(setup.card, setup.numerics),
        seconds_per_image=job.seconds_per_image,
        width=job.width,
        height=job.height,
        num_inference_steps=job.num_inference_steps,
        batch=job.batch,
        images=job.batch * job.batches,
        measured_at=setup.measured_at,
        stages=Stages(
            load_s=measured.cold.load_s,
            encode_s=job.encode_s,
            encoder_in_s=job.encoder_in_s,
            denoiser_in_s=job.denoiser_in_s,
            guidance_scale=job.guidance_scale,
            guided_above=measured.guided_above,
            shapes=tuple(
                ShapeSpeed(width=width, height=height, step_s=point.step_s, decode_s=point.decode_s)
                for (width, height), point in shapes.items()
            ),
            batch=job.batch,
            peak_gib={phase: round(gib, 3) for phase, gib in measured.peak_gib.items()},
            dtype=setup.numerics.dtype,
            quantise=_quantised(setup),
            versions=setup.numerics.versions,
            working=_working(setup, measured),
            measured_at=setup.measured_at,
        ),
    )


def _working(setup: Setup, measured: Measured) -> WorkingMemory | None:
    """The most of all shapes, each by the pixels that it had on the device together; None where nothing was measured.

    A prompt's is no less than the estimate: those measured are not the longest.
    """
    card = setup.card
    points = [point for point in (measured.job, *measured.points) if {"denoise", "decode"} <= point.working_gib.keys()]
    if not points:
        return None
    steps, decodes = [], []
    for point in points:
        pixels, guided = point.width * point.height, point.guidance_scale > 0
        together = denoised_together(card, pixels, point.batch, guided=guided)
        steps.append(point.working_gib["denoise"] * MEGAPIXEL / together)
        decodes.append(point.working_gib["decode"] * MEGAPIXEL / decoded_together(pixels, point.batch))
    return WorkingMemory(
        encode_gib=max(ENCODE_GIB, *(point.working_gib.get("encode", 0.0) for point in points)),
        step_gib=max(steps),
        decode_gib=max(decodes),
        identity=drawing_identity(card, setup.numerics),
    )


def record_of(setup: Setup, measured: Measured, ways: Sequence[Way] = ()) -> dict[str, Any]:
    """Return everything as JSON values, the memory's samples thinned."""
    return {
        "model": card_identity(setup.card, setup.numerics.device),
        "device": setup.device,
        "vram_gib": setup.vram_gib,
        "numerics": setup.numerics.model_dump(mode="json"),
        "quantise": _quantised(setup),
        "measured_at": setup.measured_at,
        "environment": dict(setup.environment),
        "command": setup.command,
        "prompts": list(setup.prompts),
        "negative_prompt": setup.negative_prompt,
        "seed": setup.seed,
        "cold": {**asdict(measured.cold), "seconds": measured.cold.seconds},
        "warm": {name: asdict(spread) for name, spread in warm_spreads(measured).items()},
        "job": asdict(measured.job),
        "points": [asdict(point) for point in measured.points],
        "memory": {
            "of": setup.held,
            "before_gib": measured.before_gib,
            "peak_gib": dict(measured.peak_gib),
            "samples": [[round(one.at_s, 3), one.held_bytes] for one in thinned(measured.samples, SAMPLES_KEPT)],
        },
        "drawn": [asdict(one) for one in measured.drawn],
        "accelerated": [way.record() for way in ways],
    }


def warm_spreads(measured: Measured) -> dict[str, Spread]:
    """Return how the warm pictures' seconds lie, by stage."""
    warm = measured.warm()
    found = {name: spread_of([float(getattr(one, field)) for one in warm]) for name, field in WARM}
    return {**found, "one step": spread_of([one.step_s for one in warm])}


def report(setup: Setup, measured: Measured, ways: Sequence[Way] = ()) -> str:
    """Return the page."""
    job = measured.job
    parts = [
        f"# {setup.card.title} on {setup.device}",
        f"{setup.measured_at[:10]}. `{setup.command}`",
        _setup_table(setup, job),
        "## Cold start",
        "From the start of the process to the first picture. Files that the kernel still has in memory load faster than from a "
        "cold disk; this does not empty its cache.",
        cold_table(measured),
        "## One picture after another",
        f"Median and spread over {len(measured.warm())} of the pictures, batch 1: {setup.rounds} rounds of {setup.images}"
        f"{_dropped(setup)}; each prompt is encoded anew.",
        warm_table(measured),
        f"As a job draws, in batches of {job.batch}, prompts {_encoded(measured)}: {three_digits(job.seconds_per_image)} s "
        f"an image, {three_digits(job.step_s)} s of it a step, {three_digits(job.decode_s)} s decoding; a prompt takes "
        f"{three_digits(job.encode_s)} s.{_coming(job)}",
        "![Seconds by picture, and what was swept](seconds.svg)",
        "## Memory",
        f"{setup.held[0].upper()}{setup.held[1:]}, looked at every {1000 * setup.interval_s:.0f} ms and at the ends of phases. "
        f"{_gib(measured.before_gib)} GiB were held before the model was loaded. Swept sizes and batches have peaks of "
        "their own.",
        memory_table(measured),
        *_beside_weights(job),
        "![Memory over time](memory.svg)",
    ]
    if by_steps := measured.by_steps():
        parts += ["## Steps", steps_table(by_steps)]
    for part, title in (("size", "Sizes"), ("batch", "Batches")):
        points = [point for point in measured.points if point.part == part]
        if points:
            parts += [f"## {title}", points_table(points)]
    if ways:
        parts += [
            "## Acceleration",
            "The card accelerated otherwise, each way loaded anew and measured after the last. A gain is how many times as long "
            "the card as it is takes: the mean of its figures before all others and after them, which tell how steady the "
            f"machine was. {setup.images} pictures are compared with its own: how many are the same bytes, and the PSNR of the "
            "median one. Whether it pays both tell, and your eyes.",
            ways_table(measured, ways),
            "![As it is, and accelerated](acceleration.png)",
        ]
    parts += ["## Pictures", "![Seeds down, steps across](sheet.png)", "Prompts, in turn:"]
    parts.append("\n".join(f"{place}. `{prompt}`" for place, prompt in enumerate(setup.prompts, start=1)))
    if setup.negative_prompt:
        parts.append(f"Negative prompt: `{setup.negative_prompt}`")
    return "\n\n".join(parts) + "\n"


def cold_table(measured: Measured) -> str:
    """Markdown."""
    cold = measured.cold
    rows = [
        ("start of the process, imports", cold.start_s),
        ("load the model", cold.load_s),
        ("encode the prompt", cold.encode_s),
        ("first step", cold.first_step_s),
        ("further steps", cold.further_steps_s),
        ("decode", cold.decode_s),
        ("**until the first picture**", cold.seconds),
    ]
    return "\n".join(["| | s |", "|---|---|", *(f"| {name} | {three_digits(seconds)} |" for name, seconds in rows)])


def warm_table(measured: Measured) -> str:
    """Markdown."""
    lines = ["| s | median | p95 | least | most |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {' | '.join(three_digits(value) for value in (one.median, one.p95, one.least, one.most))} |"
        for name, one in warm_spreads(measured).items()
    ]
    return "\n".join(lines)


def memory_table(measured: Measured) -> str:
    """Markdown."""
    lines = ["| phase | peak, GiB |", "|---|---|"]
    return "\n".join([*lines, *(f"| {phase} | {_gib(gib)} |" for phase, gib in measured.peak_gib.items())])


def _beside_weights(job: Point) -> Iterator[str]:
    if job.working_gib:
        taken = ", ".join(f"{phase} {_gib(gib)} GiB" for phase, gib in job.working_gib.items())
        yield f"Beside the weights, in batches of {job.batch}: {taken}. Placement goes by this on such a device."


def steps_table(by_steps: Mapping[int, Sequence[Drawn]]) -> str:
    """Markdown; the ratio is to the fewest steps."""
    lines = ["| steps | pictures | s a picture | s a step | against the fewest |", "|---|---|---|---|---|"]
    medians = {steps: spread_of([one.seconds for one in drawn]).median for steps, drawn in sorted(by_steps.items())}
    base = next(iter(medians.values()))
    for steps, seconds in medians.items():
        step_s = spread_of([one.step_s for one in by_steps[steps]]).median
        lines.append(
            f"| {steps} | {len(by_steps[steps])} | {three_digits(seconds)} | {three_digits(step_s)} | {seconds / base:.2f}× |"
        )
    return "\n".join(lines)


def points_table(points: Sequence[Point]) -> str:
    """Markdown."""
    lines = ["| size | batch | s an image | s a step | s decoding | peak, GiB |", "|---|---|---|---|---|---|"]
    for one in points:
        if one.failed is not None:
            lines.append(f"| {one.width}×{one.height} | {one.batch} | no memory left | | | |")
        else:
            lines.append(
                f"| {one.width}×{one.height} | {one.batch} | {three_digits(one.seconds_per_image)} | {three_digits(one.step_s)} "
                f"| {three_digits(one.decode_s)} | {_gib(one.peak_gib)} |"
            )
    return "\n".join(lines)


def ways_table(measured: Measured, ways: Sequence[Way]) -> str:
    """Markdown; the card as it is comes first."""
    lines = [
        "| acceleration | load, s | s a picture | gain | s an image of a job | batch | gain | peak, GiB | equal | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def figures(one: Measured) -> tuple[str, str, str, str]:
        seconds = (one.cold.load_s, picture_s(one), one.job.seconds_per_image)
        return *(three_digits(each) for each in seconds), _gib(max(one.peak_gib.values()))  # type: ignore[return-value]

    load, picture, job, peak = figures(measured)
    lines.append(f"| as it is | {load} | {picture} | | {job} | {measured.job.batch} | | {peak} | | |")
    for way in ways:
        if way.measured is None:
            said = str(way.failed).replace("|", "\\|")
            lines.append(f"| {way.name} | cannot be had here: {said} | | | | | | | | |")
            continue
        load, picture, job, peak = figures(way.measured)
        psnr = "—" if way.median_db is None else f"{way.median_db:.1f}"
        lines.append(
            f"| {way.name} | {load} | {picture} | {way.picture_gain:.2f}× | {job} | {way.measured.job.batch} "
            f"| {way.job_gain:.2f}× | {peak} | {way.equal} | {psnr} |"
        )
    return "\n".join(lines)


def _setup_table(setup: Setup, job: Point) -> str:
    numerics = setup.numerics
    quantised = ", ".join(f"{part} {how}" for part, how in _quantised(setup).items()) or "nothing"
    versions = [f"{name} {said}" for name, said in numerics.versions.items()]
    about = setup.environment
    rows = [
        (
            "device",
            f"{setup.device}, a budget of {setup.vram_gib:g} GiB" if numerics.device == "cuda" else setup.device,
        ),
        ("machine", f"{about['processor']}, {about['cores']} cores, Python {about['python']}"),
        ("dtype", numerics.dtype),
        ("quantised", quantised),
        ("acceleration", str(setup.card.accelerated_on(numerics.device))),
        ("picture", f"{job.width}×{job.height}, {job.num_inference_steps} steps, guidance {job.guidance_scale:g}"),
        ("batch of a job", str(job.batch)),
        ("versions", ", ".join(versions)),
    ]
    if numerics.device == "cpu":
        rows.insert(1, ("threads", str(numerics.threads)))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {said} |" for name, said in rows)])


def _encoded(measured: Measured) -> str:
    inside = all(one.encode_s for one in measured.of("job"))
    return "encoded with each batch" if inside else "encoded ahead"


def _dropped(setup: Setup) -> str:
    dropped = ["the first round"] if setup.rounds > 1 else []
    dropped += ["the first picture of each"] if setup.images > 1 else []
    return f", without {' and '.join(dropped)}" if dropped else ""


def _coming(job: Point) -> str:
    if job.encoder_in_s is None or job.denoiser_in_s is None:
        return ""
    return (
        f" Before a shard's prompts it takes {three_digits(job.encoder_in_s)} s until the encoder is on the device, and after "
        f"them {three_digits(job.denoiser_in_s)} s until the denoiser is back."
    )


def _quantised(setup: Setup) -> dict[str, str]:
    """What a card quantises, which it does on a GPU; a denoiser of its own says its format."""
    found: dict[str, str] = {}
    if setup.card.denoiser is not None:
        found["denoiser"] = setup.card.denoiser.file
    if setup.numerics.device == "cuda":
        found |= dict(setup.card.quantise.items())
    return found


def three_digits(seconds: float) -> str:
    """Say seconds to three significant digits, without an exponent."""
    digits = 0 if seconds >= 100 else 1 if seconds >= 10 else 2 if seconds >= 1 else 3 if seconds >= 0.1 else 4
    return f"{seconds:.{digits}f}"


def _gib(gib: float) -> str:
    return f"{gib:.2f}"
