"""The family `qwen-image`: diffusers' QwenImagePipeline, its phases called one by one.

Prompts are encoded one at a time and without padding, and a batch's prompts have one length, so that none needs a mask: padded
ones without it come out wrong. `guidance_scale` is the pipeline's `true_cfg_scale`; up to 1 there is no guidance, above it
there always is, with an empty negative prompt too.
"""

import copy
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from farm.modelcard import RenderParams
from farm.models.diffusion import Modules, sound
from farm.models.family import Embedding, StepCallback, Tokens
from farm.models.firstblock import FirstBlockCache, Streams
from farm.models.latent import LatentFamily
from farm.models.qwen_vae import FrameDecoder
from farm.models.schedulers import load_scheduler
from farm.plan import ImageSpec

NOTHING = " "
"""What the model was trained with where a prompt is empty."""


class QwenFamily(LatentFamily):
    """A Qwen-Image model on one device."""

    def _load_modules(self, folder: Path) -> Modules:
        loader = self._loader
        self._tokenizer = loader.small("tokenizer", AutoTokenizer, trust_remote_code=False)
        eyes_and_words = loader.encoder("text_encoder", Qwen2_5_VLForConditionalGeneration)
        reader: nn.Module = eyes_and_words.model.language_model  # prompts need neither eyes nor a next word
        transformer = loader.denoiser("transformer", QwenImageTransformer2DModel)
        loader.adapt(transformer, QwenImagePipeline)
        decoder = FrameDecoder(loader.decoder("vae", AutoencoderKLQwenImage))
        self._new_scheduler = load_scheduler(self._card, folder)
        return Modules(reader, transformer, decoder)

    def _open(self) -> None:
        # This pipeline denoises only: its device and dtype are those of the transformer, the one module that it holds.
        self._cache, denoiser = self._new_cache(), self._modules.denoiser
        pipeline = QwenImagePipeline(
            scheduler=None,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=denoiser if self._cache is None else _with_cache(denoiser, self._cache),
        )
        pipeline.scheduler = self._new_scheduler()
        pipeline.vae_scale_factor = self._modules.decoder.scale_factor
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline

    def _forget(self, *, guided: bool = False) -> None:
        """Only a cache keeps something of a batch."""
        if self._cache is not None:
            self._cache.forget(passes=1 + guided)

    def guided(self, params: RenderParams) -> bool:
        """The pipeline guides above 1."""
        return params.guidance_scale > 1

    def tokenize(self, prompt: str) -> Tokens:
        """Cut a prompt, in the model's template, into at most `max_sequence_length` tokens besides the template's first."""
        pipeline = self._pipeline
        text = pipeline.prompt_template_encode.format(sound(prompt) or NOTHING)
        most = self._card.max_sequence_length + pipeline.prompt_template_encode_start_idx
        return Tokens(tuple(self._tokenizer(text, truncation=True, max_length=most)["input_ids"]))

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """Prompts of exactly one length share a batch, so that there is no padding to mask."""
        return len(positive.ids), len(negative.ids) if negative else 0

    def encode(self, tokens: Tokens) -> Embedding:
        """Encode one prompt by itself: tokens x features, the template's first left out, in host memory."""
        with self._phase("encode", "encode a prompt"):
            ids = torch.tensor([tokens.ids], device=self._encoder_device)
            hidden = self._modules.encoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).last_hidden_state[0, self._pipeline.prompt_template_encode_start_idx :]
            states = hidden.to("cpu", copy=True)
        return Embedding(states, states.nbytes)

    def _latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        step = self._pipeline.vae_scale_factor * 2
        return (self._modules.denoiser.config.in_channels // 4, 2 * (height // step), 2 * (width // step))

    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: torch.Tensor,
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> torch.Tensor:
        """Return the latents of a batch of one shape, as they are before packing. `negative` is empty without guidance."""
        params, pipeline = specs[0].params, self._pipeline

        def after_step(_: QwenImagePipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, len(pipeline.scheduler.timesteps))
            return tensors

        doing = f"denoise {len(specs)} images of {params.width}x{params.height}"
        with self._phase("denoise", doing):
            prompts = self._collate(positive)
            given = {"prompt_embeds": prompts, "prompt_embeds_mask": torch.ones_like(prompts[..., 0], dtype=torch.long)}
            if negative:
                against = self._collate(negative)
                given["negative_prompt_embeds"] = against
                given["negative_prompt_embeds_mask"] = torch.ones_like(against[..., 0], dtype=torch.long)
            self._forget(guided=bool(negative))
            try:
                latents = pipeline(
                    **given,
                    true_cfg_scale=params.guidance_scale if negative else 1.0,
                    latents=pipeline._pack_latents(noise.to(self._device.torch), *noise.shape),
                    width=params.width,
                    height=params.height,
                    num_inference_steps=params.num_inference_steps,
                    max_sequence_length=self._card.max_sequence_length,
                    callback_on_step_end=after_step,
                    output_type="latent",
                    return_dict=False,
                )[0]
            finally:
                self._forget()
            unpacked: torch.Tensor = pipeline._unpack_latents(
                latents, params.height, params.width, pipeline.vae_scale_factor
            )
            return unpacked[:, :, 0]

    def _collate(self, embeddings: Sequence[Embedding]) -> torch.Tensor:
        return torch.stack([embedding.states for embedding in embeddings]).to(self._device.torch)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._modules.decoder(latents)
        return images


class _Blocks(nn.Module):  # type: ignore[misc]
    """All blocks of a transformer as one, in the model's own loop over them."""

    def __init__(self, blocks: nn.ModuleList, cache: FirstBlockCache):
        super().__init__()
        self.blocks = blocks
        self._cache = cache

    def forward(self, *, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **given: Any) -> Streams:
        """Arguments, and what is returned, as a block's: text, then picture."""

        def block(each: Any, streams: Streams) -> Streams:
            text, picture = streams
            out: Streams = each(hidden_states=picture, encoder_hidden_states=text, **given)
            return out

        return self._cache.through(self.blocks, (encoder_hidden_states, hidden_states), block)


def _with_cache(transformer: QwenImageTransformer2DModel, cache: FirstBlockCache) -> QwenImageTransformer2DModel:
    """Return a transformer of the very same weights that leaves blocks out; the given one is as it was."""
    other = copy.copy(transformer)
    other._modules = dict(transformer._modules)
    other.transformer_blocks = nn.ModuleList([_Blocks(transformer.transformer_blocks, cache)])
    return other
