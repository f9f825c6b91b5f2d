"""The family `z-image`: diffusers' ZImagePipeline, its phases called one by one.

Prompts are encoded one at a time and without padding. Denoising is the stock pipeline's loop; decoding keeps its order of
operations.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoTokenizer, Qwen3Model

from farm.cardparts import PLAIN
from farm.models.diffusion import Modules, sound
from farm.models.family import Embedding, StepCallback, Tokens
from farm.models.latent import LatentFamily
from farm.models.packed import pack_blocks, packs
from farm.models.schedulers import load_scheduler
from farm.models.zimage_steps import StepTransformer
from farm.plan import ImageSpec

CAPTION_MULTIPLE = 32
"""The transformer pads captions to multiples of this; longer differences would need an attention mask."""


class ZImageFamily(LatentFamily):
    """A Z-Image model on one device."""

    def _load_modules(self, folder: Path) -> Modules:
        loader = self._loader
        self._tokenizer = loader.small("tokenizer", AutoTokenizer, trust_remote_code=False)
        encoder = loader.encoder("text_encoder", Qwen3Model)
        transformer = loader.denoiser("transformer", ZImageTransformer2DModel)
        loader.adapt(transformer, ZImagePipeline)
        vae = loader.decoder("vae", AutoencoderKL)
        how = self._acceleration
        own = self._card.denoiser is None and "denoiser" not in self.quantised
        plain = own and not self._card.adapters and not how.compile and how.attention == PLAIN.attention
        if plain and packs(self._device.torch, self._dtype):
            for blocks in (transformer.layers, transformer.noise_refiner, transformer.context_refiner):
                pack_blocks(blocks)
        self._new_scheduler = load_scheduler(self._card, folder)
        return Modules(encoder, transformer, vae)

    def _open(self) -> None:
        streams = self.placement is not None and "denoiser" in self.placement.streamed
        self._steps = StepTransformer(self._modules.denoiser, keeps=not streams, cache=self._new_cache())
        # This pipeline denoises only: its device and dtype are those of the transformer, the one module that it holds.
        pipeline = ZImagePipeline(
            scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=self._modules.denoiser
        )
        pipeline.scheduler = self._new_scheduler()
        if streams:  # blocks come by hooks of the model itself
            self._modules.denoiser.forward = self._steps.forward
        else:
            pipeline.transformer = self._steps
        pipeline.vae_scale_factor = 2 ** (len(self._modules.decoder.config.block_out_channels) - 1)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline

    def _forget(self, *, guided: bool = False) -> None:
        self._steps.forget(guided=guided)

    def tokenize(self, prompt: str) -> Tokens:
        """Cut a prompt, in the model's chat template, into at most `max_sequence_length` tokens."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": sound(prompt)}],
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
            ids = torch.tensor([tokens.ids], device=self._encoder_device)
            hidden = self._modules.encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
            ).hidden_states[-2][0]
            states = hidden.to("cpu", copy=True)
        return Embedding(states, states.nbytes)

    def _latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        step = self._pipeline.vae_scale_factor * 2
        return (self._modules.denoiser.in_channels, 2 * (height // step), 2 * (width // step))

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

        def after_step(_: ZImagePipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, len(self._pipeline.scheduler.timesteps))
            return tensors

        doing = f"denoise {len(specs)} images of {params.width}x{params.height}"
        with self._phase("denoise", doing):
            self._forget(guided=bool(negative))
            try:
                latents: torch.Tensor = self._pipeline(
                    prompt_embeds=self._collate(positive),
                    negative_prompt_embeds=self._collate(negative) if negative else None,
                    latents=noise.to(self._device.torch),
                    width=params.width,
                    height=params.height,
                    num_inference_steps=params.num_inference_steps,
                    guidance_scale=params.guidance_scale,
                    callback_on_step_end=after_step,
                    output_type="latent",
                    return_dict=False,
                )[0]
            finally:
                self._forget()
        return latents

    def _collate(self, embeddings: Sequence[Embedding]) -> list[torch.Tensor]:
        return [embedding.states.to(self._device.torch) for embedding in embeddings]

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae: Any = self._modules.decoder
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: torch.Tensor = vae.decode(scaled, return_dict=False)[0]
        return images
