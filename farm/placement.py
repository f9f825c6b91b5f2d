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
    the card has prompts encoded in main memory. `pixels`: of one picture of the batch. `denoiser_q4_gib`: the denoiser's size as
    Q4_K_M, None where it is quantised. `measured`: working sets are, by `farm bench` on such a device.
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
    batch: int = 1
    pixels: int | None = None
    denoiser_q4_gib: float | None = None
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
    reason = f"{what}, decode {n.decode_gib:.1f} GiB, batch {n.batch}, {peak_gib:.1f} of {usable:.1f} GiB{how}"
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
    worst = n.largest_part_gib
    streams = "" if n.denoiser_streamed_gib is None else f", {n.denoiser_streamed_gib:.1f} block by block"
    return (
        f"model {model} does not fit {device.name}: its largest phase needs {worst:.1f} GiB (text encoder "
        f"{n.encoder_gib:.1f}, denoiser {n.denoiser_gib:.1f}{streams} + {n.step_gib:.1f} a step of batch {n.batch}, decoder "
        f"{n.decoder_gib:.1f} + {n.decode_gib:.1f} a decode) and {room:.1f} GiB may be used; {_nearest(n, room)}"
    )


def _nearest(n: Needs, given: float) -> str:
    """What would fit, the least change first."""
    nearest: list[str] = []
    denoiser = min(n.denoiser_gib, n.denoiser_streamed_gib or n.denoiser_gib)
    each = n.step_gib / n.batch
    encoder = min(n.encoder_gib, n.encoder_streamed_gib or n.encoder_gib) + n.encode_gib
    rest_fits = n.encoder_on_cpu or encoder <= given
    decode_fits = n.decoder_gib + n.decode_gib <= given
    if rest_fits and decode_fits and n.batch > 1 and each and denoiser + each <= given:
        nearest.append(f"a batch of {int((given - denoiser) / each)}")
    room = min((given - denoiser) / n.step_gib if n.step_gib else 1.0, (given - n.decoder_gib) / (n.decode_gib or 1.0))
    if rest_fits and n.pixels and 0 < room < 1 and n.pixels * room >= SMALLEST_PX**2:
        side = int((n.pixels * room) ** 0.5) // SMALLEST_PX * SMALLEST_PX
        nearest.append(f"pictures of {side}x{side}")
    if n.denoiser_q4_gib is not None and n.denoiser_q4_gib + n.step_gib <= given < n.denoiser_gib + n.step_gib:
        nearest.append(f"a card with a GGUF denoiser (as Q4_K_M about {n.denoiser_q4_gib:.1f} GiB)")
    if rest_fits and n.plain_streamed_gib is not None and n.plain_streamed_gib + n.step_gib <= given:
        nearest.append("the card without compile or first_block_cache, whose blocks then come one by one")
    if not rest_fits:
        nearest.append("a card that quantises the text encoder")
    needed = math.ceil((n.largest_part_gib + CONTEXT_GIB + SLACK_GIB) * 2) / 2
    nearest.append(f"a GPU of {needed:g} GiB with FARM_VRAM_GIB={needed:g}")
    return f"nearest that fits: {', or '.join(nearest)}"
