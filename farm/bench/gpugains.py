"""What compiling, attention kernels, larger batches, left-out blocks and nf4 gain on a GPU, each beside the card's own way.

The same pictures, at the same budget of memory, in the same run; a gain is how many times as long the card's own way takes.
Beside it stands how far the pictures are from those of that way, which with random weights tells rounding from something broken
and nothing of quality. How much a first-block cache leaves out is the weights' affair: with random ones its row tells that it
runs, and not what it gains (`farm.bench.caches` judges that on a trained model). What cannot be had on this machine is a row
that says why.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from farm.bench.giants import Giant, prompts, unquantised
from farm.bench.gpufidelity import draw, specs_of
from farm.bench.gpufigures import Case
from farm.bench.gpushard import draw_shard
from farm.bench.report import three_digits
from farm.cardparts import Acceleration, Attention
from farm.engine import Engine, Picture
from farm.errors import FarmError
from farm.modelcard import ModelCard
from farm.models.device import Device
from farm.plan import Numerics

GIB = 2**30
BATCH = 4
KERNELS: tuple[Attention, ...] = ("_native_cudnn", "_native_flash", "_native_efficient")
CACHE_THRESHOLD = 0.1
OWN = "the card's own way"


@dataclass(frozen=True, slots=True)
class Gain:
    """One way to draw. `gain`: the seconds of the card's own way against these; `apart`: mean levels of 255 from its pictures."""

    model: str
    case: Case
    way: str
    load_s: float | None = None
    seconds_per_image: float | None = None
    gain: float | None = None
    apart: float | None = None
    peak_gib: float | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """A name, the card that goes it, and how many pictures are drawn together."""

    name: str
    card: Callable[[], ModelCard]
    batch: int = 1


def gains_of(
    giant: Giant,
    numerics: Numerics,
    case: Case,
    *,
    device: str,
    vram_gib: float,
    images: int,
    say: Callable[[str], None],
) -> Iterator[Gain]:
    """Draw a shard each way, the card's own first."""
    first: tuple[float, list[Picture]] | None = None
    for way in _ways(giant, numerics.device, say):
        say(f"{giant.card.name}, {way.name}")
        try:
            gain, pictures = _drawn(way, numerics, case, device=device, vram_gib=vram_gib, images=images)
        except FarmError as exc:
            yield Gain(giant.card.name, case, way.name, failed=exc.message)
            Device(device, vram_gib=vram_gib).recover()
            continue
        if way.name == OWN and gain.seconds_per_image is not None:
            first = gain.seconds_per_image, pictures
        yield _beside(first, gain, pictures)


def _ways(giant: Giant, device: str, say: Callable[[str], None]) -> Iterator[Way]:
    card = giant.card

    def accelerated(how: Acceleration) -> Callable[[], ModelCard]:
        return lambda: card.model_copy(update={"acceleration": {device: how}})

    yield Way(OWN, lambda: card)
    yield Way("compiled blocks", accelerated(Acceleration(compile=True)))
    if card.family != "newbie":
        for kernel in KERNELS:
            yield Way(f"attention {kernel}", accelerated(Acceleration(attention=kernel)))
    yield Way(f"batches of {BATCH}", lambda: card, BATCH)
    if card.family != "newbie":
        cached = Acceleration(first_block_cache=CACHE_THRESHOLD)
        yield Way(f"first-block cache, {CACHE_THRESHOLD:g}", accelerated(cached))
    if card.family == "qwen-image":
        yield Way("denoiser in nf4 in place of GGUF", lambda: _in_nf4(giant, device, say))


def _in_nf4(giant: Giant, device: str, say: Callable[[str], None]) -> ModelCard:
    """Raises FarmError where nothing is quantised as it loads, before anything is written."""
    if device == "cpu":
        raise FarmError("on a CPU nothing is quantised as it loads")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FarmError("bitsandbytes is not installed")
    whole = unquantised(giant, say=say)
    return whole.model_copy(update={"quantise": {**whole.quantise, "denoiser": "nf4"}})


def _drawn(
    way: Way, numerics: Numerics, case: Case, *, device: str, vram_gib: float, images: int
) -> tuple[Gain, list[Picture]]:
    card, on_gpu = way.card(), device != "cpu"
    engine = Engine(card, numerics, device, vram_gib)
    try:
        load_s = engine.load()
        count = -(-max(images, 2 * way.batch) // way.batch) * way.batch
        specs = specs_of(card, prompts(count + way.batch, first=700), case)
        draw_shard(engine, specs[: way.batch], way.batch, on_gpu)  # warms up
        engine.recover()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds, _, _ = draw_shard(engine, specs[way.batch :], way.batch, on_gpu)
        peak = torch.cuda.max_memory_reserved(device) / GIB if on_gpu else None
        pictures = draw(engine, specs_of(card, prompts(2, first=800), case))
    finally:
        engine.unload()
        Device(device, vram_gib=vram_gib).recover()
    return Gain(card.name, case, way.name, load_s, seconds / count, peak_gib=peak), pictures


def _beside(first: tuple[float, list[Picture]] | None, gain: Gain, pictures: Sequence[Picture]) -> Gain:
    if first is None or not gain.seconds_per_image:
        return gain
    pairs = zip(pictures, first[1], strict=True)
    apart = [float(np.abs(one.pixels.astype(float) - other.pixels).mean()) for one, other in pairs]
    return replace(gain, gain=first[0] / gain.seconds_per_image, apart=max(apart))


def gains_table(gains: Sequence[Gain]) -> str:
    """Markdown."""
    lines = [
        "| model | picture | way | load, s | s an image | gain | levels apart | peak reserved, GiB |",
        "|" + "---|" * 8,
    ]
    for one in gains:
        begin = f"| {one.model} | {one.case} | {one.way} | "
        if one.failed is not None:
            lines.append(f"{begin}| {one.failed} | | | |")
            continue
        values = (one.load_s, one.seconds_per_image, one.gain, one.apart, one.peak_gib)
        figures = ("—" if value is None else three_digits(value) for value in values)
        lines.append(f"{begin}{' | '.join(figures)} |")
    return "\n".join(lines)
