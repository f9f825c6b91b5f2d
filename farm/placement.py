"""Where a model's parts lie on one device: everything at once, a part at a time, or a block at a time.

Pure: sizes and the device come in as numbers, and what cannot fit is refused before anything loads. The numerics are
the plan's; nothing here changes a pixel, so a quantised encoder, or one on the CPU, is the card's word and not chosen here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from farm.errors import PlacementError

CONTEXT_GIB = 1.0
"""Left free of the budget: the CUDA context, and what libraries take, lie outside torch's allocator."""
SLACK_GIB = 0.1
"""Of what torch's allocator may reserve, left for fragments, which are few with expandable segments; an estimate."""
ENCODE_GIB = 0.25
"""Room for one prompt's activations in a text encoder; an estimate."""
GGUF_STEP_GIB = 0.4
"""A GGUF denoiser dequantises a layer at a time, whatever the size of a picture; an estimate."""
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which bfloat16 is native; `torch.cuda.is_bf16_supported()` counts emulation too."""
HOST_SHARE = 0.85
"""Of a node's memory, what weights may take; the rest is for the system, pictures on their way out, and loading. Estimated."""
PINNED_SHARE = 0.5
"""Of a node's memory, what may be pinned, where nothing can swap it out. Estimated."""

SMALLEST_PX = 64
"""Sizes that a refusal names are multiples of this."""

Layout = Literal["resident", "phased", "streamed"]
Within = Literal["anything", "encoded", "nothing"]
"""What may be drawn within a denoising step: any prompts, those that are encoded already, or nothing."""
ALL: frozenset[str] = frozenset({"encoder", "denoiser", "decoder"})
DRAWING: frozenset[str] = frozenset({"denoiser", "decoder"})
ENCODER, DENOISER, DECODER = frozenset({"encoder"}), frozenset({"denoiser"}), frozenset({"decoder"})
NONE: frozenset[str] = frozenset()

URGENT_WAIT: dict[Within, str] = {
    "anything": "within a step",
    "encoded": "within a step once encoded, else at the end of the batch",
    "nothing": "at the end of the batch",
}
"""How long an urgent image waits for the model that is loaded."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a device offers. `vram_gib` is the budget of one renderer, `total_gib` what the card has; None on a CPU.

    `host_gib`: memory of its node, None where nobody counted; `renderers`: how many share that node.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    vram_gib: float
    total_gib: float | None = None
    capability: tuple[int, int] | None = None
    host_gib: float | None = None
    renderers: int = 1

    @property
    def usable_gib(self) -> float:
        """What torch's allocator may reserve, GiB."""
        return min(self.vram_gib, self.total_gib or self.vram_gib) - CONTEXT_GIB

    @property
    def room_gib(self) -> float:
        """What weights and working sets may take of that, GiB."""
        return self.usable_gib - SLACK_GIB

    def host_holds(self, gib: float, *, share: float = HOST_SHARE) -> bool:
        """Whether the node's memory takes so much from each of its renderers."""
        return self.host_gib is None or gib * self.renderers <= self.host_gib * share


@dataclass(frozen=True, slots=True)
class Needs:
    """A model's parts and its largest working sets, GiB, in the plan's dtype and batch.

    `inner_step_gib`, `inner_decode_gib`: of an urgent image within a step, `kept_gib`: of the batch meanwhile.
    `encoder_streamed_gib`, `denoiser_streamed_gib`: what of a part is on the device at once where it comes block by block, None
    where it cannot; `plain_streamed_gib`: the same of a denoiser that cannot for its acceleration alone. `encoder_on_cpu`:
    the card has prompts encoded in main memory; `encoder_moves`: it could. `pixels`: of one picture of the batch;
    `limit_pixels`: of the card's largest, where a decode is counted at that, and None where at `pixels`. `fixed_step_gib`: of a
    step, what does not grow with pictures. `denoiser_q4_gib`, `encoder_q4_gib`: what they would take as Q4_K_M and as nf4, None
    where they are quantised or cannot be. `measured`: working sets are, by `farm bench` on such a device.
    """

    encoder_gib: float
    denoiser_gib: float
    decoder_gib: float
    step_gib: float
    decode_gib: float
    inner_step_gib: float = 0.0
    inner_decode_gib: float = 0.0
    kept_gib: float = 0.0
    encode_gib: float = ENCODE_GIB
    encoder_streamed_gib: float | None = None
    denoiser_streamed_gib: float | None = None
    plain_streamed_gib: float | None = None
    encoder_on_cpu: bool = False
    encoder_moves: bool = False
    batch: int = 1
    pixels: int | None = None
    limit_pixels: int | None = None
    fixed_step_gib: float = 0.0
    denoiser_q4_gib: float | None = None
    encoder_q4_gib: float | None = None
    measured: bool = False

    @property
    def weights_gib(self) -> float:
        """All parts."""
        return self.encoder_gib + self.denoiser_gib + self.decoder_gib

    @property
    def drawing_gib(self) -> float:
        """Denoiser and decoder together, with a batch's largest working set."""
        return self.denoiser_gib + self.decoder_gib + max(self.step_gib, self.decode_gib)

    @property
    def inner_gib(self) -> float:
        """What an urgent image within a step takes, and what a batch keeps between two of its own: no activations."""
        return self.kept_gib + max(self.inner_step_gib, self.inner_decode_gib)

    @property
    def resident_gib(self) -> float:
        """Everything on the device, with the largest working set."""
        return max(self.encoder_gib + self.drawing_gib, self.weights_gib + self.encode_gib)

    @property
    def largest_part_gib(self) -> float:
        """The worst moment when one part at a time is on the device."""
        encode_gib = 0.0 if self.encoder_on_cpu else self.encoder_gib + self.encode_gib
        return max(encode_gib, self.denoiser_gib + self.step_gib, self.decoder_gib + self.decode_gib)

    @property
    def least_gib(self) -> float:
        """The worst moment in the layout that takes the least."""
        return min(placement.peak_gib for placement in _layouts(self, 0.0))

    def in_batches_of(self, batch: int) -> "Needs":
        """The same with fewer pictures at once."""
        grows_gib = (self.step_gib - self.fixed_step_gib) * batch / self.batch
        return replace(self, batch=batch, step_gib=self.fixed_step_gib + grows_gib)

    def at_most(self, pixels: int) -> "Needs":
        """The same with smaller pictures, where `pixels` is known."""
        given = self.pixels or pixels
        grows_gib = (self.step_gib - self.fixed_step_gib) * min(1.0, pixels / given)
        decode_gib = self.decode_gib * min(1.0, pixels / (self.limit_pixels or given))
        return replace(self, step_gib=self.fixed_step_gib + grows_gib, decode_gib=decode_gib)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which parts are on the device at each stage, by the names encoder, denoiser, decoder.

    `peak_gib` is the estimate at the worst stage, `reason` one readable line. `streamed`: parts of which only some blocks are
    there at a time; `on_cpu`: parts that compute in main memory. `reserves`: there is room for an urgent image within a step.
    `host_gib`: what copies of the weights in host memory take, 0 where none are kept; `pins`: whether those may be pinned.
    """

    layout: Layout
    encode: frozenset[str]
    denoise: frozenset[str]
    decode: frozenset[str]
    peak_gib: float
    reason: str
    streamed: frozenset[str] = NONE
    on_cpu: frozenset[str] = NONE
    reserves: bool = True
    host_gib: float = 0.0
    pins: bool = False

    @property
    def encodes_ahead(self) -> bool:
        """Whether the encoder leaves the device before denoising starts."""
        return "encoder" not in self.denoise | self.on_cpu

    @property
    def within(self) -> Within:
        """What may be drawn within a step: what needs nothing that is not there then. Streamed blocks are in one's use."""
        if not self.reserves or self.streamed & self.denoise or not (self.denoise & self.decode) >= DRAWING:
            return "nothing"
        return "encoded" if self.encodes_ahead else "anything"

    @property
    def explained(self) -> str:
        """One line for people: the layout, what lies where, and how long urgent images wait."""
        return f"{self.layout}: {self.reason}; urgent images: {URGENT_WAIT[self.within]}"


def place(model: str, needs: Needs, *, dtype: str, device: DeviceLimits) -> Placement:
    """Choose a placement: the first that fits of resident, phased, streamed.

    Raises PlacementError, with the numbers and the nearest that would do, where the model cannot fit the device or the node's
    memory, or would not be sound.
    """
    if device.kind == "cpu":
        if not device.host_holds(needs.weights_gib):
            raise PlacementError(_host_refusal(model, needs.weights_gib, device))
        reason = f"{needs.weights_gib:.1f} GiB in main memory, batch {needs.batch}"
        return Placement("resident", ALL, ALL, ALL, needs.resident_gib, reason, host_gib=needs.weights_gib)
    if dtype == "bfloat16" and device.capability is not None and device.capability < BFLOAT16_CAPABILITY:
        major, minor = device.capability
        raise PlacementError(
            f"model {model} is planned in bfloat16 and {device.name} has compute capability {major}.{minor}, which "
            f"only emulates it; render on a GPU of capability 8.0 or newer (RTX 30 series, A4000, L4)"
        )
    usable = device.usable_gib
    for placement in _layouts(needs, usable):
        if placement.peak_gib <= device.room_gib:
            return _with_host_copies(model, placement, needs, device)
    raise PlacementError(_refusal(model, needs, device))


def _layouts(n: Needs, usable: float) -> Iterator[Placement]:
    """All layouts, the quickest first, whether or not they fit."""
    encoder, stays = f"text encoder {n.encoder_gib:.1f} GiB", f"denoiser {n.denoiser_gib:.1f} GiB stays"
    encode_gib = n.encoder_gib + n.encode_gib
    inner_gib = n.denoiser_gib + n.decoder_gib + n.inner_gib
    alone: tuple[frozenset[str], ...] = (ENCODER, DENOISER, DECODER)
    on_cpu = NONE
    if n.encoder_on_cpu:
        encoder, encode_gib, alone, on_cpu = f"{encoder} on the CPU", 0.0, (NONE, DENOISER, DECODER), ENCODER
        stages = (DRAWING, DRAWING, DRAWING)
        yield _layout(n, usable, "phased", stages, n.drawing_gib, f"{encoder}, {stays}", inner_gib, on_cpu=on_cpu)
    else:
        what = f"all parts stay ({encoder}, denoiser {n.denoiser_gib:.1f}, decoder {n.decoder_gib:.1f})"
        yield _layout(n, usable, "resident", (ALL, ALL, ALL), n.resident_gib, what, n.encoder_gib + inner_gib)
        for first, what, peak_gib in (
            (ALL, f"{encoder} beside the others for the prompts, {stays}", n.weights_gib + n.encode_gib),
            (ENCODER, f"{encoder} in for the prompts, then {stays}", encode_gib),
        ):
            stages = (first, DRAWING, DRAWING)
            yield _layout(n, usable, "phased", stages, max(peak_gib, n.drawing_gib), what, inner_gib)
    what = f"one part at a time ({encoder}, denoiser {n.denoiser_gib:.1f}, decoder {n.decoder_gib:.1f})"
    yield _layout(n, usable, "phased", alone, n.largest_part_gib, what, on_cpu=on_cpu)
    if n.encoder_streamed_gib is not None and not n.encoder_on_cpu:
        peak_gib = max(n.encoder_streamed_gib + n.encode_gib, n.drawing_gib)
        what = f"{encoder} block by block for the prompts, then {stays}"
        stages = (ENCODER, DRAWING, DRAWING)
        yield _layout(n, usable, "streamed", stages, peak_gib, what, inner_gib, streamed=ENCODER)
    if n.denoiser_streamed_gib is not None:
        denoise_gib, decode_gib = n.denoiser_streamed_gib + n.step_gib, n.decoder_gib + n.decode_gib
        blocks = f"denoiser block by block, {n.denoiser_streamed_gib:.1f} of {n.denoiser_gib:.1f} GiB at a time"
        peak_gib = max(encode_gib, denoise_gib, decode_gib)
        yield _layout(n, usable, "streamed", alone, peak_gib, f"{encoder}, {blocks}", streamed=DENOISER, on_cpu=on_cpu)
        if n.encoder_streamed_gib is not None and not n.encoder_on_cpu:
            peak_gib = max(n.encoder_streamed_gib + n.encode_gib, denoise_gib, decode_gib)
            what = f"{encoder} and {blocks}"
            yield _layout(n, usable, "streamed", alone, peak_gib, what, streamed=ENCODER | DENOISER)


def _layout(
    n: Needs,
    usable: float,
    layout: Layout,
    stages: tuple[frozenset[str], ...],
    peak_gib: float,
    what: str,
    inner_gib: float | None = None,
    *,
    streamed: frozenset[str] = NONE,
    on_cpu: frozenset[str] = NONE,
) -> Placement:
    """`inner_gib`: what is on the device while an urgent image is drawn within a step, None where none can be."""
    reserves = inner_gib is not None and inner_gib <= usable - SLACK_GIB
    peak_gib = max(peak_gib, inner_gib) if inner_gib is not None and reserves else peak_gib
    how = " as measured" if n.measured else ""
    at = f" at the card's limit of {n.limit_pixels:,} pixels" if n.limit_pixels else ""
    at = f" and steps{at}" if at and n.batch > 1 else at
    reason = f"{what}, decode {n.decode_gib:.1f} GiB{at}, batch {n.batch}, {peak_gib:.1f} of {usable:.1f} GiB{how}"
    encode, denoise, decode = stages
    return Placement(layout, encode, denoise, decode, peak_gib, reason, streamed, on_cpu, reserves)


def _with_host_copies(model: str, placement: Placement, n: Needs, device: DeviceLimits) -> Placement:
    """Parts that come and go are copied from host memory, which must hold them; parts that stay are kept there too, where
    there is room, so that the model comes back without a load."""
    if device.host_holds(n.weights_gib):
        pins = placement.layout != "resident" and device.host_holds(n.weights_gib, share=PINNED_SHARE)
        return replace(placement, host_gib=n.weights_gib, pins=pins)
    if placement.layout == "resident":
        return placement
    raise PlacementError(_host_refusal(model, n.weights_gib, device))


def _host_refusal(model: str, gib: float, device: DeviceLimits) -> str:
    held = (device.host_gib or 0.0) * HOST_SHARE
    fewer = int(held / gib)
    nearest = f"start {fewer} with FARM_RENDERERS={fewer}" if fewer else "add memory, or choose a quantised card"
    return (
        f"model {model} on {device.name} keeps {gib:.1f} GiB of weights in main memory for each renderer, {device.renderers} of "
        f"them {gib * device.renderers:.1f} GiB, and of the node's {device.host_gib or 0.0:.1f} GiB they may take {held:.1f}; "
        f"{nearest}"
    )


def _refusal(model: str, n: Needs, device: DeviceLimits) -> str:
    room = device.room_gib
    encoder, denoiser = (
        "" if gib is None else f", {gib:.1f} block by block"
        for gib in (None if n.encoder_on_cpu else n.encoder_streamed_gib, n.denoiser_streamed_gib)
    )
    return (
        f"model {model} does not fit {device.name}: its largest phase needs {n.least_gib:.1f} GiB (text encoder "
        f"{n.encoder_gib:.1f}{encoder}, denoiser {n.denoiser_gib:.1f}{denoiser} + {n.step_gib:.1f} a step of batch {n.batch}, "
        f"decoder {n.decoder_gib:.1f} + {n.decode_gib:.1f} a decode) and {max(room, 0.0):.1f} GiB may be used; "
        f"nearest that fits: {', or '.join(_nearest(n, room))}"
    )


def _nearest(n: Needs, room: float) -> Iterator[str]:
    """What would fit, the least change first: each change by itself, and a larger GPU."""
    fewer = (batch for batch in range(n.batch - 1, 0, -1) if n.in_batches_of(batch).least_gib <= room)
    if batch := next(fewer, None):
        yield f"a batch of {batch}"
    largest = math.isqrt(n.limit_pixels or n.pixels or 0) if n.pixels else 0
    sides = range(largest // SMALLEST_PX * SMALLEST_PX, 0, -SMALLEST_PX)
    if side := next((side for side in sides if n.at_most(side**2).least_gib <= room), None):
        yield f"a card with limits: {{max_pixels: {side**2}}}" if n.limit_pixels else f"pictures of {side}x{side}"
    changes: list[tuple[str, Needs]] = []
    if n.plain_streamed_gib is not None:
        without = "the card without compile or first_block_cache, whose blocks then come one by one"
        changes.append((without, replace(n, denoiser_streamed_gib=n.plain_streamed_gib)))
    if n.encoder_moves and not n.encoder_on_cpu:
        changes.append(("a card with options: {encoder_on: cpu}", replace(n, encoder_on_cpu=True)))
    if n.encoder_q4_gib is not None:
        quantised = replace(n, encoder_gib=n.encoder_q4_gib, encoder_streamed_gib=None)
        changes.append(("a card with quantise: {encoder: nf4}", quantised))
    if n.denoiser_q4_gib is not None:
        what = f"a card with a GGUF denoiser (as Q4_K_M about {n.denoiser_q4_gib:.1f} GiB)"
        changes.append((what, _as_q4(n, n.denoiser_q4_gib)))
    yield from (what for what, changed in changes if changed.least_gib <= room)
    needed = math.ceil((n.least_gib + CONTEXT_GIB + SLACK_GIB) * 2) / 2
    yield f"a GPU of {needed:g} GiB with FARM_VRAM_GIB={needed:g}"


def _as_q4(n: Needs, gib: float) -> Needs:
    streamed = n.denoiser_streamed_gib
    return replace(
        n,
        denoiser_gib=gib,
        denoiser_streamed_gib=None if streamed is None else streamed * gib / n.denoiser_gib,
        step_gib=n.step_gib + GGUF_STEP_GIB,
    )
