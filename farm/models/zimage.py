"""The family `z-image`: diffusers' ZImagePipeline, its phases called one by one.

Prompts are encoded one at a time and without padding, noise is drawn per image on the CPU in fp32: an image depends on
its batch mates in float rounding alone. Denoising is the stock pipeline's loop; decoding keeps its order of operations.
"""

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoTokenizer, Qwen3Model
from transformers.utils import logging as transformers_logging

from farm.modelcard import ModelCard
from farm.models.device import GIB, Device, Part
from farm.models.family import Decoded, Embedding, StepCallback, Tokens, Within
from farm.models.loading import load_part, locate, part_bytes
from farm.models.packed import pack_block, packs
from farm.models.zimage_steps import StepTransformer
from farm.placement import Needs, Placement, place
from farm.plan import ImageSpec, Numerics

CAPTION_MULTIPLE = 32
"""The transformer pads captions to multiples of this; longer differences would need an attention mask."""
STEP_GIB_PER_MEGAPIXEL = 0.5
"""One image of a step at 1024 x 1024 in bf16, without guidance; estimated 0.48."""
DECODE_GIB_PER_MEGAPIXEL = 1.5
"""FLUX's VAE, untiled; an estimate."""
DECODE_PIXELS = 2**20
"""Pictures are decoded in slices of at most so many pixels, at least one picture: decoding needs the most memory."""
PARTS = {"encoder": "text_encoder", "denoiser": "transformer", "decoder": "vae"}


class ZImageFamily:
    """A Z-Image model on one device."""

    def __init__(self, card: ModelCard, numerics: Numerics, *, device: str, vram_gib: float):
        self._card = card
        self._numerics = numerics
        self._dtype: torch.dtype = getattr(torch, numerics.dtype)
        self._device = Device(device, vram_gib=vram_gib)
        self._parts: dict[str, Part] = {}
        self.placement: Placement | None = None
        self.encodes_ahead = False

    def load(self) -> None:
        """Place and load. Raises ModelCardError for missing or broken weights, PlacementError for what cannot fit."""
        card = self._card
        folder = locate(card)
        limits = self._device.limits()
        self.placement = place(card.name, self._needs(folder), dtype=self._numerics.dtype, device=limits)
        self._device.hold_to_budget()
        with self._device.errors(f"load model {card.name}"):
            self._load_parts(folder)
            if self.placement.layout == "resident":
                for module in (self._text_encoder, self._transformer, self._vae):
                    module.to(self._device.torch)
        if self.placement.layout == "phased":
            self.encodes_ahead = True
            self._parts = {
                "encoder": Part(self._text_encoder),
                "denoiser": Part(self._transformer),
                "decoder": Part(self._vae),
            }

    def _needs(self, folder: Path) -> Needs:
        """Estimate a step at the card's defaults and a decode at its limits: the engine is loaded before it sees a plan's
        sizes and guidance. A plan that asks for more than the estimate has its batches halved, and fails nothing that fits
        alone."""
        card, itemsize = self._card, self._dtype.itemsize
        gib = {name: part_bytes(card, folder, part, itemsize=itemsize) / GIB for name, part in PARTS.items()}
        megapixels = card.defaults.width * card.defaults.height / 2**20
        forwards = 2 if card.defaults.guidance_scale > 0 else 1
        largest = min(card.limits.max_pixels, card.limits.max_px**2)
        scale = itemsize / 2
        return Needs(
            encoder_gib=gib["encoder"],
            denoiser_gib=gib["denoiser"],
            decoder_gib=gib["decoder"],
            step_gib=STEP_GIB_PER_MEGAPIXEL * megapixels * self._numerics.batch * forwards * scale,
            decode_gib=DECODE_GIB_PER_MEGAPIXEL * max(DECODE_PIXELS, largest) / 2**20 * scale,
        )

    def _load_parts(self, folder: Path) -> None:
        def load(part: str, model: Any, **options: Any) -> Any:
            return load_part(
                self._card, folder, part, lambda: model.from_pretrained(folder / part, local_files_only=True, **options)
            )

        transformers_logging.disable_progress_bar()
        weights = {"dtype": self._dtype, "use_safetensors": True}
        self._tokenizer = load("tokenizer", AutoTokenizer, trust_remote_code=False)
        self._text_encoder = load("text_encoder", Qwen3Model, **weights).eval()
        self._transformer = load("transformer", ZImageTransformer2DModel, **weights).eval()
        self._vae = load("vae", AutoencoderKL, **weights).eval()
        if packs(self._device.torch, self._dtype):
            model = self._transformer
            for block in (*model.layers, *model.noise_refiner, *model.context_refiner):
                pack_block(block)
        self._open_pipeline(load("scheduler", FlowMatchEulerDiscreteScheduler))

    def _open_pipeline(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        self._steps = StepTransformer(self._transformer)
        # This pipeline denoises only: its device and dtype are those of the transformer, the one module that it holds.
        pipeline = ZImagePipeline(
            scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=self._transformer
        )
        pipeline.transformer = self._steps
        pipeline.vae_scale_factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline

    @property
    def within(self) -> Within:
        """Anything where all parts stay on the device; where the encoder leaves, what is encoded, if the others stay."""
        if self.placement is None or self.placement.layout == "resident":
            return "anything"
        return "encoded" if self.placement.denoise == self.placement.decode else "nothing"

    def inside(self) -> "ZImageFamily":
        """Share the modules and where they lie; have a pipeline, a scheduler and a step's memory of its own."""
        inner = copy.copy(self)
        inner._open_pipeline(FlowMatchEulerDiscreteScheduler.from_config(self._pipeline.scheduler.config))
        return inner

    def unload(self) -> None:
        """Let go of all weights and device memory."""
        self._parts = {}
        for name in ("_tokenizer", "_text_encoder", "_transformer", "_vae", "_steps", "_pipeline"):
            if hasattr(self, name):
                delattr(self, name)
        self._device.empty_cache()

    @contextmanager
    def _phase(self, phase: Literal["encode", "denoise", "decode"], doing: str) -> Iterator[None]:
        """Have exactly the phase's parts on the device; what leaves goes first, so that both never share it."""
        self._set_threads()
        with self._device.errors(doing):
            if self.placement and self._parts:
                names: frozenset[str] = getattr(self.placement, phase)
                for name, part in self._parts.items():
                    if name not in names:
                        part.move(torch.device("cpu"))
                for name in names:
                    self._parts[name].move(self._device.torch)
            # Weights are moved outside: a tensor made in inference mode cannot become a parameter's data.
            with torch.inference_mode():
                yield

    def _set_threads(self) -> None:
        """Torch counts its CPU threads for each calling thread by itself, and shards take turns in several."""
        if not self._device.is_cuda and torch.get_num_threads() != self._numerics.threads:
            torch.set_num_threads(self._numerics.threads)

    def tokenize(self, prompt: str) -> Tokens:
        """Cut a prompt, in the model's chat template, into at most `max_sequence_length` tokens."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _sound(prompt)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        cut = self._tokenizer(text, truncation=True, max_length=self._card.max_sequence_length)
        return Tokens(tuple(cut["input_ids"]))

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """Captions of one padded length share a batch, so that none needs a mask on account of another."""
        lengths = (len(positive.ids), len(negative.ids) if negative else 0)
        return tuple(-(-length // CAPTION_MULTIPLE) for length in lengths)

    def encode(self, tokens: Tokens) -> Embedding:
        """Encode one prompt by itself: tokens x features, in host memory, so that kept ones take none of the device's."""
        with self._phase("encode", "encode a prompt"):
            ids = torch.tensor([tokens.ids], device=self._device.torch)
            hidden = self._text_encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
            ).hidden_states[-2][0]
            states = hidden.to("cpu", copy=True)
        return Embedding(states, states.nbytes)

    def noise(self, specs: Sequence[ImageSpec]) -> torch.Tensor:
        """Draw each image's noise on the CPU in fp32, as the stock pipeline does with one generator an image."""
        step = self._pipeline.vae_scale_factor * 2
        drawn = [
            torch.randn(
                (
                    1,
                    self._transformer.in_channels,
                    2 * (spec.params.height // step),
                    2 * (spec.params.width // step),
                ),
                generator=torch.Generator("cpu").manual_seed(spec.seed),
                dtype=torch.float32,
            )
            for spec in specs
        ]
        return torch.cat(drawn)

    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: torch.Tensor,
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> torch.Tensor:
        """Return the latents of a batch of one shape. `negative` is empty without guidance."""
        params = specs[0].params
        steps = params.num_inference_steps

        def after_step(_: ZImagePipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, steps)
            return tensors

        doing = f"denoise {len(specs)} images of {params.width}x{params.height}"
        with self._phase("denoise", doing):
            self._steps.forget(guided=bool(negative))
            try:
                latents: torch.Tensor = self._pipeline(
                    prompt_embeds=self._collate(positive),
                    negative_prompt_embeds=self._collate(negative) if negative else None,
                    latents=noise.to(self._device.torch),
                    width=params.width,
                    height=params.height,
                    num_inference_steps=steps,
                    guidance_scale=params.guidance_scale,
                    callback_on_step_end=after_step,
                    output_type="latent",
                    return_dict=False,
                )[0]
            finally:
                self._steps.forget()
        return latents

    def _collate(self, embeddings: Sequence[Embedding]) -> list[torch.Tensor]:
        return [embedding.states.to(self._device.torch) for embedding in embeddings]

    def decode(self, latents: torch.Tensor, spec: ImageSpec) -> Decoded:
        """Turn latents into pixels, on the device, in slices whose size follows from the picture's alone."""
        params = spec.params
        at_once = max(1, DECODE_PIXELS // (params.width * params.height))
        doing = f"decode {len(latents)} images of {params.width}x{params.height}"
        with self._phase("decode", doing):
            pixels: list[Any] = []
            finite: list[bool] = []
            for some in latents.split(at_once):
                scaled = some.to(self._vae.dtype) / self._vae.config.scaling_factor + self._vae.config.shift_factor
                images = self._vae.decode(scaled, return_dict=False)[0]
                sound = torch.isfinite(images).flatten(1).all(dim=1)
                images = torch.nan_to_num(images * 0.5 + 0.5).clamp_(0, 1).float().mul_(255).round_()
                pixels.extend(images.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy())
                finite.extend(sound.tolist())
        return Decoded(tuple(pixels), tuple(finite))

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        self._device.synchronize()

    def recover(self) -> None:
        """Free what a failed batch left on the device."""
        self._steps.forget()
        self._device.recover()


def _sound(prompt: str) -> str:
    """Replace lone surrogates, which no tokenizer takes."""
    return prompt.encode("utf-8", "replace").decode("utf-8")
