"""One diffusers model on one device: placed and loaded, each phase's parts there.

What all families of torch share. A family says how its modules load and how it encodes, draws noise, denoises and decodes:
an image depends on its batch mates in float rounding alone.
"""

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from farm.cardparts import PLAIN
from farm.errors import ModelCardError
from farm.modelcard import ModelCard, RenderParams
from farm.models.acceleration import accelerate, compiling
from farm.models.device import Device, Part, Streamed
from farm.models.family import Decoded, Embedding, StepCallback, Tokens, Within
from farm.models.firstblock import FirstBlockCache
from farm.models.loading import Loader, refuse_kernels
from farm.needs import files_of, needs_of
from farm.placement import Placement, place
from farm.plan import ImageSpec, Numerics
from farm.records import WorkingMemory
from farm.weights import locate

CPU = torch.device("cpu")
LOADING = threading.RLock()
"""Held while modules are loaded: diffusers and transformers swap methods of torch's own meanwhile, in the whole process."""
WARM_PX = 256
"""Side of the pictures that are drawn as an accelerated model loads, whichever sizes its card allows.

What is compiled keeps a trace of the shapes that it was compiled for: these are the same for every card.
"""
WARM_GUIDANCE = 2.0
"""With which every family that guides at all draws guided."""
WARM_PROMPTS = ("a red circle", "a quiet harbour in the morning, boats, " * 12)
"""One of a few tokens and one of many, so that there are pictures with a mask over padded tokens and without."""


@dataclass(frozen=True, slots=True)
class Modules:
    """What a family computes with, in eval(), loaded on the CPU. An encoder of two modules is an nn.ModuleList."""

    encoder: nn.Module
    denoiser: nn.Module
    decoder: nn.Module


class DiffusionFamily(ABC):
    """The base of a family: what does not depend on the model. A family writes the methods from `_load_modules` on."""

    def __init__(
        self,
        card: ModelCard,
        numerics: Numerics,
        *,
        device: str,
        vram_gib: float,
        renderers: int | None = None,
        measured: WorkingMemory | None = None,
        quantises: bool | None = None,
    ):
        """`quantises`: whether parts are quantised as the card says; where nobody says, on a GPU alone. The others are
        `farm.models.family.open_family`'s."""
        self._card = card
        self._numerics = numerics
        self._dtype: torch.dtype = getattr(torch, numerics.dtype)
        self._device = Device(device, vram_gib=vram_gib, renderers=renderers)
        self._parts: dict[str, Part | Streamed] = {}
        self._loaded = False
        self._measured = measured
        self.quantised = card.quantise if (self._device.is_cuda if quantises is None else quantises) else {}
        self._acceleration = card.accelerated_on(numerics.device)
        self.placement: Placement | None = None
        self.encodes_ahead = False
        self._bare = frozenset({*vars(self), "_bare"})

    def load(self) -> None:
        """Place and load; after `park` only copy. What fails half way leaves nothing behind.

        Raises ModelCardError for missing or broken weights, PlacementError for what cannot fit.
        """
        if self._loaded:
            try:
                self._settle()
            except BaseException:
                self.park()
                raise
            return
        try:
            if self.placement is None:
                self.place()
            with LOADING:
                self._load()
        except BaseException:
            self.unload()
            raise

    def place(self) -> None:
        """Find the weights, fetch them where they are not here, and decide where they will lie; nothing is on the device yet.

        Raises PlacementError for what cannot fit, ModelCardError for weights that are missing.
        """
        card, numerics = self._card, self._numerics
        limits = self._device.limits()
        folder, files = locate(card), files_of(card)
        needs = needs_of(
            card,
            folder,
            dtype=numerics.dtype,
            batch=numerics.batch,
            files=files,
            device=limits.kind,
            quantise=self.quantised,
            measured=self._measured,
        )
        self._where = folder, files
        self.placement = place(card.name, needs, dtype=numerics.dtype, device=limits)

    def _load(self) -> None:
        card, placement = self._card, self.placement
        assert placement is not None
        folder, files = self._where
        self._device.hold_to_budget()
        with self._device.errors(f"load model {card.name}"):
            refuse_kernels(card, folder)
            self._loader = Loader(card, folder, files, self._dtype, self._device.torch, self.quantised)
            modules = self._modules = self._load_modules(folder)
            accelerate(card.name, modules.denoiser, self._acceleration)
            self._open()
            for name in ("encoder", "denoiser", "decoder"):
                kind = Streamed if name in placement.streamed else Part
                self._parts[name] = kind(getattr(modules, name), pin=placement.pins)
        self._settle()
        if placement.layout == "resident" and not placement.host_gib:
            self._parts = {}
        self.encodes_ahead = placement.encodes_ahead
        self._loaded = True
        if self._acceleration != PLAIN:
            self._try()

    def _try(self) -> None:
        """Draw pictures that nobody sees: what is compiled is compiled now, for each way through the denoiser, and what cannot
        work on this device is found out before there is a job in hand. Raises ModelCardError."""
        try:
            if not self._acceleration.compile:
                self._draw_unseen([WARM_PROMPTS[1]], [])
                self._draw_unseen([WARM_PROMPTS[1]], [WARM_PROMPTS[0]])
                return
            short, long = WARM_PROMPTS
            share = self.bucket(self.tokenize(short), None) == self.bucket(self.tokenize(long), None)
            with compiling():
                for images in (1, 2)[: self._numerics.batch]:  # two stand for any number
                    self._draw_unseen([long] * images, [])
                    self._draw_unseen([long] * images, [long] * images)
                    self._draw_unseen([long] * images, [short] * images)
                    if images > 1 and share:
                        self._draw_unseen([short] + [long] * (images - 1), [])
        except (RuntimeError, ValueError, TypeError, ImportError, AssertionError, OSError) as exc:
            line = f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
            raise ModelCardError(
                f"model {self._card.name}: with {self._acceleration} it cannot be drawn on {self._device.torch}: {line}; take it "
                f"out of the card's acceleration, and give the job a new name"
            ) from exc
        finally:
            self.recover()

    def _draw_unseen(self, prompts: Sequence[str], negative: Sequence[str]) -> None:
        """Denoise a batch of small pictures in two steps."""
        multiple = self._card.limits.multiple_of
        side = -(-WARM_PX // multiple) * multiple
        params = RenderParams(
            width=side, height=side, num_inference_steps=2, guidance_scale=WARM_GUIDANCE if negative else 0.0
        )
        specs = [ImageSpec(place, place, None, text, place, params, {}) for place, text in enumerate(prompts)]
        positive, against = ([self.encode(self.tokenize(text)) for text in texts] for texts in (prompts, negative))
        self.denoise(specs, self.noise(specs), positive=positive, negative=against, on_step=lambda step, steps: None)

    def _settle(self) -> None:
        """Bring everything onto the device where everything stays there; else the phases do."""
        if self.placement and self.placement.layout == "resident":
            with self._device.errors(f"load model {self._card.name}"):
                for part in self._parts.values():
                    part.move(self._device.torch)

    @property
    def within(self) -> Within:
        """Follows from which parts are on the device at a step."""
        return self.placement.within if self.placement else "anything"

    def inside(self) -> Self:
        """Share the modules and where they lie; have a pipeline, a scheduler and a step's memory of its own."""
        inner = copy.copy(self)
        inner._open()
        return inner

    def _new_cache(self) -> FirstBlockCache | None:
        """For one drawing, where the card has a first-block cache."""
        threshold = self._acceleration.first_block_cache
        return None if threshold is None else FirstBlockCache(threshold)

    @property
    def host_bytes(self) -> int:
        """What the weights take in host memory: all that came on a CPU, and on a GPU the copies that parts keep."""
        if self._parts or self._device.is_cuda or self.placement is None:
            return sum(part.nbytes for part in self._parts.values())
        modules = self._modules
        return sum(Part(module).nbytes for module in (modules.encoder, modules.denoiser, modules.decoder))

    def park(self) -> bool:
        """Leave the device and keep the weights in host memory; False where they are on the device alone."""
        if not self._parts:
            return not self._device.is_cuda
        self._forget()
        for part in self._parts.values():
            part.move(CPU)
        self._device.empty_cache()
        return True

    def unload(self) -> None:
        """Let go of all weights and device memory, and of all else that came with loading."""
        self._parts = {}
        self._loaded = False
        self.placement, self.encodes_ahead = None, False
        for name in vars(self).keys() - self._bare:
            delattr(self, name)
        self._device.let_go()

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        self._device.synchronize()

    def recover(self) -> None:
        """Free what a failed batch left on the device."""
        if self._loaded:
            self._forget()
        self._device.recover()

    @contextmanager
    def _phase(self, phase: Literal["encode", "denoise", "decode"], doing: str) -> Iterator[None]:
        """Have exactly the phase's parts on the device; what leaves goes first, so that both never share it."""
        self._set_threads()
        with self._device.errors(doing):
            if self.placement and self._parts:
                names: frozenset[str] = getattr(self.placement, phase)
                for name, part in self._parts.items():
                    if name not in names:
                        part.move(CPU)
                for name in names:
                    self._parts[name].move(self._device.torch)
            # Weights are moved outside: a tensor made in inference mode cannot become a parameter's data.
            with torch.inference_mode(), self._watching(phase):
                yield

    def _watching(self, phase: Literal["encode", "denoise", "decode"]) -> AbstractContextManager[None]:
        """Measure a phase whose weights all lie on the device; of a part whose blocks come meanwhile nothing could be told."""
        part = {"encode": "encoder", "denoise": "denoiser", "decode": "decoder"}[phase]
        comes = self.placement is not None and part in self.placement.streamed
        return nullcontext() if comes else self._device.watching(phase)

    def watch_memory(self) -> None:
        """Begin to measure, or anew, what each phase takes on a GPU beside the weights."""
        self._device.working = {}

    @property
    def working_bytes(self) -> Mapping[str, int]:
        """The most that each phase took since `watch_memory`; empty on a CPU."""
        return self._device.working or {}

    def _set_threads(self) -> None:
        """Torch counts its CPU threads for each calling thread by itself, and shards take turns in several."""
        if not self._device.is_cuda and torch.get_num_threads() != self._numerics.threads:
            torch.set_num_threads(self._numerics.threads)

    @property
    def _encoder_device(self) -> torch.device:
        """Where prompts are encoded; their embeddings are kept in host memory whichever it is."""
        on_cpu = self.placement is not None and "encoder" in self.placement.on_cpu
        return CPU if on_cpu else self._device.torch

    def guided(self, params: RenderParams) -> bool:
        """Whether pictures of these parameters are drawn with a negative prompt."""
        return params.guidance_scale > 0

    @abstractmethod
    def _load_modules(self, folder: Path) -> Modules:
        """Load the model on the CPU, and keep tokenizer and scheduler. Raises ModelCardError."""

    @abstractmethod
    def _open(self) -> None:
        """Make what one drawing needs of its own: pipeline, scheduler. Called after loading, and again by `inside`."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what was kept of the last batch."""

    @abstractmethod
    def tokenize(self, prompt: str) -> Tokens:
        """Cut a prompt into tokens; cheap."""

    @abstractmethod
    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """Return what two images must share, besides size and steps, to be denoised in one batch."""

    @abstractmethod
    def encode(self, tokens: Tokens) -> Embedding:
        """Encode one prompt by itself, into host memory, so that kept ones take none of the device's."""

    @abstractmethod
    def noise(self, specs: Sequence[ImageSpec]) -> Any:
        """Return what a batch is drawn from, each image's by its own seed, in host memory."""

    @abstractmethod
    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: Any,
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> torch.Tensor:
        """Return the latents of a batch of one shape. `negative` is empty without guidance."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, spec: ImageSpec) -> Decoded:
        """Turn what `denoise` returned into pixels."""


def sound(prompt: str) -> str:
    """Replace lone surrogates, which no tokenizer takes."""
    return prompt.encode("utf-8", "replace").decode("utf-8")
