"""What the farm asks of a family of models, and which code runs which family.

A family turns prompts into embeddings, embeddings and noise into latents, latents into pixels. It knows nothing of
jobs, files or threads; the engine calls it from one thread. Imports no torch, so that a family without it stays light.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from farm.modelcard import ModelCard, RenderParams
from farm.plan import ImageSpec, Numerics
from farm.records import WorkingMemory

if TYPE_CHECKING:
    from farm.models.diffusion import DiffusionFamily

StepCallback = Callable[[int, int], None]
"""Called as (steps done, steps) after each step; what it raises ends the render and leaves the family clean."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt as its family's tokenizer cuts it, cut off at the card's `max_sequence_length`."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """An encoded prompt; `states` is the family's own."""

    states: Any
    nbytes: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pictures of one batch: `pixels` uint8, height x width x 3 each; `finite` is False where the floats were not."""

    pixels: tuple[np.ndarray, ...]
    finite: tuple[bool, ...]


Within = Literal["anything", "encoded", "nothing"]
"""What may be drawn within a denoising step: any prompts, those that are encoded already, or nothing."""


class Family(Protocol):
    """One model, loaded on one device. `encodes_ahead`: the encoder leaves the device before denoising starts.

    `within`: what may be drawn while another batch is between two of its steps.
    """

    encodes_ahead: bool

    @property
    def within(self) -> Within:
        """Follows from how the model is placed; known once it is loaded."""

    def inside(self) -> "Family":
        """Return a family over the same weights that draws a batch within a step of this one and leaves no trace in it.

        One level deep; it is done with when this one unloads.
        """

    def place(self) -> None:
        """Find the weights, fetch them where they are not here, and decide where they will lie; nothing is on the device yet.

        Raises PlacementError for what cannot fit, ModelCardError for weights that are missing.
        """

    def load(self) -> None:
        """Place and load; after `park` only copy. Raises ModelCardError for missing or broken weights, PlacementError for what
        cannot fit."""

    @property
    def host_bytes(self) -> int:
        """What its weights take in host memory; 0 where they are on the device alone."""

    def park(self) -> bool:
        """Leave the device and keep the weights in host memory; returns False, and does nothing, where none are there."""

    def unload(self) -> None:
        """Let go of all weights and device memory."""

    def tokenize(self, prompt: str) -> Tokens:
        """Cut a prompt into tokens; cheap."""

    def guided(self, params: RenderParams) -> bool:
        """Whether pictures of these parameters are drawn with a negative prompt."""

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """Return what two images must share, besides size and steps, to be denoised in one batch."""

    def encode(self, tokens: Tokens) -> Embedding:
        """Encode one prompt by itself, so that its embedding does not depend on its neighbours."""

    def noise(self, specs: Sequence[ImageSpec]) -> Any:
        """Draw each image's noise from its own seed."""

    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: Any,
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> Any:
        """Return the latents of a batch of one shape. `negative` is empty without guidance."""

    def decode(self, latents: Any, spec: ImageSpec) -> Decoded:
        """Turn the latents of a batch, all of the shape of `spec`, into pixels."""

    def watch_memory(self) -> None:
        """Begin to measure, or anew, what each phase takes on the device beside the weights."""

    @property
    def working_bytes(self) -> Mapping[str, int]:
        """The most that each phase took since `watch_memory`: encode, denoise, decode; empty where that cannot be told."""

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""

    def recover(self) -> None:
        """Free what a failed batch left on the device; called once its exception is let go of, weights stay."""


def open_family(
    card: ModelCard,
    numerics: Numerics,
    *,
    device: str,
    vram_gib: float,
    renderers: int | None = None,
    measured: WorkingMemory | None = None,
    quantises: bool | None = None,
) -> Family:
    """Return the family of a card, nothing loaded yet. `device` is torch's name of it: cpu, cuda or cuda:N.

    `renderers`: how many share the node's memory; one for each of its GPUs where nobody says. `measured`: what drawing takes on
    such a device, estimated where nobody measured it. `quantises`: whether parts are quantised as the card says; where nobody
    says, on a GPU alone.
    """
    if card.family == "sleep":
        from farm.models.sleep import SleepFamily

        return SleepFamily()
    kind = _class_of(card.family)
    return kind(
        card, numerics, device=device, vram_gib=vram_gib, renderers=renderers, measured=measured, quantises=quantises
    )


def _class_of(family: str) -> "type[DiffusionFamily]":
    """Torch and diffusers come with it."""
    if family == "qwen-image":
        from farm.models.qwen import QwenFamily

        return QwenFamily
    if family == "newbie":
        from farm.models.newbie import NewBieFamily

        return NewBieFamily
    if family == "diffusers":
        from farm.models.pipeline import PipelineFamily

        return PipelineFamily
    from farm.models.zimage import ZImageFamily

    return ZImageFamily
