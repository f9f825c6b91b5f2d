"""Where a model's parts lie on one device: everything at once, or a part at a time.

Pure: sizes and the device come in as numbers, and what cannot fit is refused before anything loads. The numerics are
the plan's; nothing here changes a pixel.
"""

from dataclasses import dataclass
from typing import Literal

from farm.errors import PlacementError

CONTEXT_GIB = 1.0
"""Left free of the budget: the CUDA context lies outside torch's allocator, and fragments cost something."""
ENCODE_GIB = 0.25
"""Room for one prompt's activations in a text encoder."""
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which bfloat16 is native; `torch.cuda.is_bf16_supported()` counts emulation too."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a device offers. `vram_gib` is the budget of one renderer, `total_gib` what the card has; None on a CPU."""

    kind: Literal["cuda", "cpu"]
    name: str
    vram_gib: float
    total_gib: float | None = None
    capability: tuple[int, int] | None = None

    @property
    def usable_gib(self) -> float:
        """What torch's allocator may reserve, GiB."""
        return min(self.vram_gib, self.total_gib or self.vram_gib) - CONTEXT_GIB


@dataclass(frozen=True, slots=True)
class Needs:
    """A model's parts and its largest working sets, GiB, in the plan's dtype and batch."""

    encoder_gib: float
    denoiser_gib: float
    decoder_gib: float
    step_gib: float
    decode_gib: float

    @property
    def resident_gib(self) -> float:
        """Everything on the device, with the largest working set."""
        parts = self.encoder_gib + self.denoiser_gib + self.decoder_gib
        return parts + max(ENCODE_GIB, self.step_gib, self.decode_gib)

    @property
    def drawing_gib(self) -> float:
        """Denoiser and decoder together, the text encoder away."""
        return self.denoiser_gib + self.decoder_gib + max(self.step_gib, self.decode_gib)

    @property
    def largest_part_gib(self) -> float:
        """The worst moment when one part at a time is on the device."""
        return max(self.encoder_gib + ENCODE_GIB, self.denoiser_gib + self.step_gib, self.decoder_gib + self.decode_gib)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which parts share the device: `together` at each stage, by the names encoder, denoiser, decoder.

    `peak_gib` is the estimate at the worst stage, `reason` one readable line.
    """

    layout: Literal["resident", "phased"]
    encode: frozenset[str]
    denoise: frozenset[str]
    decode: frozenset[str]
    peak_gib: float
    reason: str


ALL = frozenset({"encoder", "denoiser", "decoder"})
DRAWING = frozenset({"denoiser", "decoder"})


def place(model: str, needs: Needs, *, dtype: str, device: DeviceLimits) -> Placement:
    """Choose a placement. Raises PlacementError, with the numbers, where the model cannot fit or would not be sound."""
    if device.kind == "cpu":
        return Placement("resident", ALL, ALL, ALL, needs.resident_gib, "a CPU renders from main memory")
    if dtype == "bfloat16" and device.capability is not None and device.capability < BFLOAT16_CAPABILITY:
        major, minor = device.capability
        raise PlacementError(
            f"model {model} is planned in bfloat16 and {device.name} has compute capability {major}.{minor}, which "
            f"only emulates it; render on a GPU of capability 8.0 or newer (RTX 30 series, A4000, L4)"
        )
    usable = device.usable_gib
    if needs.resident_gib <= usable:
        return Placement(
            "resident", ALL, ALL, ALL, needs.resident_gib, _reason(needs.resident_gib, usable, "all parts")
        )
    encoder = frozenset({"encoder"})
    encode_gib = needs.encoder_gib + ENCODE_GIB
    if max(encode_gib, needs.drawing_gib) <= usable:
        peak = max(encode_gib, needs.drawing_gib)
        return Placement("phased", encoder, DRAWING, DRAWING, peak, _reason(peak, usable, "the text encoder by itself"))
    if needs.largest_part_gib <= usable:
        peak = needs.largest_part_gib
        parts = frozenset({"denoiser"}), frozenset({"decoder"})
        return Placement("phased", encoder, *parts, peak, _reason(peak, usable, "one part at a time"))
    raise PlacementError(
        f"model {model} does not fit {device.name}: its largest phase needs {needs.largest_part_gib:.1f} GiB "
        f"(text encoder {needs.encoder_gib:.1f}, denoiser {needs.denoiser_gib:.1f} + {needs.step_gib:.1f} a step, "
        f"decoder {needs.decoder_gib:.1f} + {needs.decode_gib:.1f} a decode) and {usable:.1f} GiB may be used; lower "
        f"the card's batch or sizes, or raise FARM_VRAM_GIB on a larger GPU"
    )


def _reason(peak_gib: float, usable_gib: float, what: str) -> str:
    return f"{what}: {peak_gib:.1f} GiB of {usable_gib:.1f} usable"
