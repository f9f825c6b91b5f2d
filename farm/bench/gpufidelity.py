"""Whether a GPU draws what it should: the same bytes however a model is placed and whatever cuts in, the same picture in a batch.

Each check draws two pictures of a few steps with the engine that it is given, and compares them with those of the first.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from farm.bench.giants import prompts
from farm.bench.gpufigures import Case, Check
from farm.bench.model import joined
from farm.engine import Engine, Picture, RenderStep
from farm.errors import FarmError, RenderError
from farm.modelcard import ModelCard, RenderParams
from farm.models.family import Family, open_family
from farm.models.quantising import in_full
from farm.models.qwen_vae import FrameDecoder
from farm.plan import ImageSpec

FIDELITY_STEPS = 3
TOLERANCE = {"bfloat16": 2.0, "float16": 2.0, "float32": 0.05}
"""Mean difference of 255 that a batch of two may make to a picture: other shapes are summed by other kernels."""
GGUF_CHECK = "the GGUF denoiser as its own blocks in full"
ENCODER_CHECK = "the quantised text encoder as its own in full"
KERNELS_CHECK = "the text encoder in nf4 as the same weights dequantised"
LEAST_COSINE = 0.75
"""Of a token's states from a text encoder in nf4 and from the whole one, for the token that is furthest off.

Measured on a CPU: 0.995 for sketch's, which is trained and has two layers; 0.82 to 0.87 for random weights in 28 to 36 layers, as
many as the large models' have, of 256 to 1024 features. The same weights in another order: below 0. In int8 0.996 and more.
"""
LEAST_KERNELS_COSINE = 0.99
"""Of a token's states by nf4 layers and by plain ones with the same weights: rounding in bfloat16 alone."""
WHOLE_GIB = 64.0
"""A budget that takes every model whole."""
VAE_TOLERANCE = 1e-3
"""Largest difference of a folded VAE's floats, in -1..1, both computed in float32."""


class Fidelity:
    """The checks of one model; `checks` is what they found."""

    def __init__(self, card: ModelCard, case: Case, device: str, dtype: str):
        self.checks: list[Check] = []
        self._card = card
        self._model = card.name
        self._case = case
        self._device = device
        self._dtype = dtype
        self._before: list[Picture] = []

    def begin(self, engine: Engine) -> None:
        """Draw what all else is compared with, and check what this engine alone can show."""
        try:
            self._before = draw(engine, self._specs())
        except FarmError as exc:
            self.checks.append(Check(self._model, "two pictures of a few steps", exc.message, None))
            return
        self._check(self._cut_in, "a cut-in changes no byte", engine)
        self._check(self._batched, "two in a batch as each alone", engine)
        if self._card.family == "qwen-image":
            self._check(self._folded, "the folded VAE as the stock one", engine)

    def placed_otherwise(self, engine: Engine, name: str) -> None:
        """Check that another placement gives the same bytes. Raises what rendering raises."""
        if self._before:
            self._same(name, self._before, draw(engine, self._specs()))

    def quantised(self, engine: Engine, family: Any) -> None:
        """Check what is quantised against the same in full. The engine, over `family`, holds all of it; it is of no use later."""
        if self._card.denoiser is not None and self._card.denoiser.format == "gguf":
            self._check(lambda one: self._dequantised(one, family), GGUF_CHECK, engine)
        if "encoder" in family.quantised:
            self._check(lambda one: self._encoded(one, family), ENCODER_CHECK, engine)

    def _dequantised(self, engine: Engine, family: Any) -> None:
        """The same blocks, dequantised once and for all by the same functions: pictures differ by rounding alone."""
        from diffusers.quantizers.gguf.utils import _dequantize_gguf_and_restore_linear

        before = draw(engine, self._specs())
        _dequantize_gguf_and_restore_linear(family._modules.denoiser)
        self._apart(GGUF_CHECK, draw(engine, self._specs()), before)

    def _encoded(self, engine: Engine, family: Any) -> None:
        """Quantising costs some, and kernels nothing; noise in place of a prompt's states would point anywhere."""
        prompt = self._specs()[0].prompt
        ours = states_of(family, prompt)
        if family.quantised["encoder"] == "nf4":
            with family._device.errors("dequantise the text encoder"):
                in_full(family._modules.encoder, family._dtype)
            self._pointing(KERNELS_CHECK, ours, states_of(family, prompt), LEAST_KERNELS_COSINE)
        engine.unload()
        plain = self._card.model_copy(update={"quantise": {}})
        whole = open_family(plain, engine.numerics, device=self._device, vram_gib=WHOLE_GIB)
        whole.load()
        theirs = states_of(whole, prompt)
        whole.unload()
        self._pointing(ENCODER_CHECK, ours, theirs, LEAST_COSINE)

    def _pointing(self, name: str, ours: torch.Tensor, theirs: torch.Tensor, least: float) -> None:
        cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min())
        found = f"cosine {cosine:.3f} for the token whose states are furthest apart; allowed {least:g}"
        self.checks.append(Check(self._model, name, found, cosine >= least))

    def _cut_in(self, engine: Engine) -> None:
        inner = engine.inside()
        urgent_spec = replace(self._specs()[0], index=99, seed=99, prompt=prompts(1, first=499)[0])
        urgent = engine.batches([urgent_spec])[0]
        alone = draw(engine, [urgent_spec])  # also encodes it
        name = "a cut-in changes no byte"
        if inner is None or not engine.fits_within_a_step(urgent):
            said = "nothing may be drawn within a step of this placement"
            self.checks.append(Check(self._model, name, said, None))
            return
        within: list[Picture] = []
        disturbed: list[Picture] = []

        def between_steps() -> float:
            began = time.perf_counter()
            inner.render_batch(urgent, on_picture=within.append, on_step=ignore, cancelled=never)
            engine.synchronize()
            return time.perf_counter() - began

        for batch in engine.batches(self._specs()):
            engine.render_batch(
                batch, on_picture=disturbed.append, on_step=ignore, cancelled=never, between_steps=between_steps
            )
        self._same(
            f"{name}: {len(within)} cut in",
            [*self._before, *(alone * len(within))],
            [*disturbed, *within],
        )

    def _batched(self, engine: Engine) -> None:
        together: list[Picture] = []
        batch = joined(engine.batches(self._specs(), most=1))
        engine.render_batch(batch, on_picture=together.append, on_step=ignore, cancelled=never)
        self._apart("two in a batch as each alone", together, self._before)

    def _folded(self, engine: Engine) -> None:
        """The engine makes room first: this is the one that holds the VAE's memory."""
        from diffusers import AutoencoderKLQwenImage

        engine.park()
        where, case = torch.device(self._device), self._case
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            vae: Any = AutoencoderKLQwenImage.from_pretrained(
                f"{self._card.source.path}/vae", torch_dtype=torch.float32
            )
            vae = vae.to(where).eval()
            latents = torch.randn((1, vae.config.z_dim, case.height // 8, case.width // 8)).to(where)
            mean, std = (
                torch.tensor(numbers, device=where).view(1, -1, 1, 1, 1)
                for numbers in (vae.config.latents_mean, vae.config.latents_std)
            )
            with torch.inference_mode():
                stock = vae.decode(latents[:, :, None] / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
                folded = FrameDecoder(vae).to(where)(latents)
            apart = float((stock - folded).abs().max())
        except torch.OutOfMemoryError as exc:
            self.checks.append(Check(self._model, "the folded VAE as the stock one", line_of(exc), None))
            return
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
        found = f"largest {apart:.2e} in -1..1, {case.width}×{case.height}; allowed {VAE_TOLERANCE:g}"
        self.checks.append(Check(self._model, "the folded VAE as the stock one", found, apart <= VAE_TOLERANCE))

    def _check(self, check: Callable[[Engine], None], name: str, engine: Engine) -> None:
        failed = None
        try:
            check(engine)
        except FarmError as exc:
            failed = exc.message
        if failed is not None:
            self.checks.append(Check(self._model, name, failed, None))
            engine.recover()

    def _apart(self, name: str, ours: Sequence[Picture], theirs: Sequence[Picture]) -> None:
        apart = [
            np.abs(one.pixels.astype(int) - other.pixels.astype(int)) for one, other in zip(ours, theirs, strict=True)
        ]
        mean, largest = max(float(each.mean()) for each in apart), max(int(each.max()) for each in apart)
        limit = TOLERANCE[self._dtype]
        found = f"mean {mean:.3f}, largest {largest} of 255; allowed a mean of {limit:g}"
        self.checks.append(Check(self._model, name, found, mean <= limit))

    def _same(self, name: str, ours: Sequence[Picture], theirs: Sequence[Picture]) -> None:
        equal = sum(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))
        found = f"{equal} of {len(ours)} pictures are the same bytes"
        self.checks.append(Check(self._model, name, found, equal == len(ours)))

    def _specs(self) -> list[ImageSpec]:
        case = self._case
        return specs_of(self._card, prompts(2, first=500), replace(case, steps=min(case.steps, FIDELITY_STEPS)))


def specs_of(card: ModelCard, texts: Sequence[str], case: Case) -> list[ImageSpec]:
    """Return a picture for each prompt."""
    params: RenderParams = card.defaults.model_copy(
        update={"width": case.width, "height": case.height, "num_inference_steps": case.steps}
    )
    return [ImageSpec(place, place, None, text, 1000 + place, params, {}) for place, text in enumerate(texts)]


def states_of(family: Family, prompt: str) -> torch.Tensor:
    """What the text encoder makes of a prompt, tokens x features, in float32."""
    states: Any = family.encode(family.tokenize(prompt)).states
    return torch.as_tensor(getattr(states, "states", states)).float()


def draw(engine: Engine, specs: Sequence[ImageSpec]) -> list[Picture]:
    """Draw pictures as a shard, in the engine's own batches. Raises RenderError for pictures that are no numbers."""
    pictures: list[Picture] = []
    engine.render(specs, on_picture=pictures.append)
    refuse_nan(pictures)
    return pictures


def refuse_nan(pictures: Sequence[Picture]) -> None:
    """Raise RenderError for pictures that are no numbers."""
    if any(picture.nan for picture in pictures):
        raise RenderError("random weights gave a picture that is no finite numbers: nothing else can be compared")


def line_of(exc: BaseException) -> str:
    """Say an error in a line of a table."""
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"


def ignore(step: RenderStep) -> None:
    """Nobody watches."""


def never() -> bool:
    """Nobody cancels."""
    return False
