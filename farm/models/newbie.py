"""The family `newbie`: NewBie-image-Exp0.1 on our own transformer and loop, as its authors published them.

The loop is Euler's over a shifted straight path. The guided prediction is held to the norm of the conditional one, counted over
the whole sample; both halves of a guided batch go through the denoiser together. Masks make captions of all lengths one batch.
Nothing of a batch outlives its call.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.models.diffusion import Modules, sound
from farm.models.family import Embedding, StepCallback, Tokens
from farm.models.latent import LatentFamily
from farm.models.loading import load_part
from farm.models.newbie_keys import converted, shape_of
from farm.models.newbie_recipe import recipe_of
from farm.models.newbie_text import POOLED_TOKENS, Gemma, for_gemma, load_jina, pooled_of, safetensors_in
from farm.models.newbie_transformer import Caption, Conditions, NewBieTransformer
from farm.plan import ImageSpec

JINA = ("clip_model", "text_encoder_2")
GEMMA_TOKENIZER = ("tokenizer", "text_encoder")
JINA_TOKENIZER = ("clip_tokenizer", "tokenizer_2", *JINA)
"""Folders by the names that the two published layouts have for them."""


@dataclass(frozen=True, slots=True)
class NewBieTokens(Tokens):
    """A prompt as both tokenizers cut it: `ids` for Gemma, behind the system prompt, `pooled` for Jina, alone."""

    pooled: tuple[int, ...]


class NewBieFamily(LatentFamily):
    """A NewBie model on one device."""

    def _load_modules(self, folder: Path) -> Modules:
        card, loader = self._card, self._loader
        self._recipe = recipe_of(card)
        # tokenizer.json by itself: the config.json beside Jina's names code to run.
        self._gemma_tokenizer, self._jina_tokenizer = (
            loader.small(_first(card, folder, "tokenizer.json", names), PreTrainedTokenizerFast)
            for names in (GEMMA_TOKENIZER, JINA_TOKENIZER)
        )
        gemma = loader.encoder("text_encoder", Gemma)
        part = _first(card, folder, "*.safetensors", JINA)
        jina = load_part(card, folder, part, lambda: load_jina(card.name, folder / part, dtype=self._dtype))
        transformer = load_part(card, folder, "transformer", lambda: self._load_transformer(folder / "transformer"))
        return Modules(nn.ModuleList([gemma, jina]).eval(), transformer, loader.decoder("vae", AutoencoderKL))

    def _load_transformer(self, folder: Path) -> NewBieTransformer:
        own = self._loader.files.get("denoiser")
        tensors: dict[str, torch.Tensor] = {}
        for file in [own] if own else safetensors_in(folder):
            tensors |= load_file(file)
        tensors = {name: tensor.to(self._dtype) for name, tensor in converted(self._card.name, tensors).items()}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            model: NewBieTransformer = NewBieTransformer(**shape_of(self._card.name, tensors, config))
        model.load_state_dict(tensors, assign=True)
        model.eval()
        return model

    def _open(self) -> None:
        """A drawing needs nothing of its own."""

    def _forget(self) -> None:
        """Nothing is kept of a batch."""

    def tokenize(self, prompt: str) -> NewBieTokens:
        """Cut a prompt for Gemma, with the system prompt at most `max_sequence_length` tokens, and for Jina."""
        text = sound(prompt)
        gemma = self._gemma_tokenizer(
            for_gemma(text, self._recipe.system_prompt), truncation=True, max_length=self._card.max_sequence_length
        )
        jina = self._jina_tokenizer(text, truncation=True, max_length=POOLED_TOKENS)
        return NewBieTokens(tuple(gemma["input_ids"]), tuple(jina["input_ids"]))

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """Captions of all lengths share a batch: with guidance there is a mask in any case."""
        return None

    def encode(self, tokens: Tokens) -> Embedding:
        """Encode one prompt by itself: Gemma's last state but one, tokens x features, and Jina's mean, in host memory."""
        assert isinstance(tokens, NewBieTokens)
        gemma, jina = self._encoders
        with self._phase("encode", "encode a prompt"):
            ids, pooled_ids = (
                torch.tensor([each], device=self._encoder_device) for each in (tokens.ids, tokens.pooled)
            )
            hidden = gemma(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
            ).hidden_states[-2][0]
            caption = Caption(hidden.to("cpu", copy=True), pooled_of(jina, pooled_ids)[0].to("cpu", copy=True))
        return Embedding(caption, sum(each.nbytes for each in (caption.states, caption.pooled) if each is not None))

    @property
    def _encoders(self) -> tuple[nn.Module, nn.Module]:
        gemma, jina = self._modules.encoder.children()
        return gemma, jina

    def _latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        denoiser: Any = self._modules.denoiser
        decoder: Any = self._modules.decoder
        patch = denoiser.config.patch_size
        step = 2 ** (len(decoder.config.block_out_channels) - 1) * patch
        return (denoiser.config.in_channels, patch * (height // step), patch * (width // step))

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
        params, recipe = specs[0].params, self._recipe
        steps, batch = params.num_inference_steps, len(specs)
        sigmas = recipe.sigmas(steps)
        until = recipe.cfg_truncation if negative else 0.0
        with self._phase("denoise", f"denoise {batch} images of {params.width}x{params.height}"):
            latents = noise.to(self._device.torch)
            captions = [embedding.states for embedding in (*positive, *negative)]
            height, width = latents.shape[-2:]
            with_negative = alone = None
            for step, (sigma, following) in enumerate(pairwise(sigmas)):
                time = 1 - sigma
                if time < until:
                    with_negative = with_negative or self._conditions(captions, height, width)
                    both = self._predict(torch.cat([latents, latents]), time, with_negative)
                    velocity = recipe.guided(both[:batch], both[batch:], params.guidance_scale)
                else:
                    with_negative = None
                    alone = alone or self._conditions(captions[:batch], height, width)
                    velocity = self._predict(latents, time, alone)
                latents = latents + (sigma - following) * velocity
                on_step(step + 1, steps)
            return latents.to(self._dtype)

    def _conditions(self, captions: Sequence[Caption], height: int, width: int) -> Conditions | Sequence[Caption]:
        """Prepare a batch's captions once. Where the denoiser comes block by block, each step goes through all of it in order."""
        if self.placement is not None and "denoiser" in self.placement.streamed:
            return captions
        denoiser: Any = self._modules.denoiser
        conditions: Conditions = denoiser.prepare(captions, height=height, width=width)
        return conditions

    def _predict(self, latents: torch.Tensor, time: float, conditions: Conditions | Sequence[Caption]) -> torch.Tensor:
        """Latents are float32 between steps, as in the authors' sampler; the denoiser has its own dtype."""
        times = torch.full((len(latents),), time, device=latents.device, dtype=torch.float32)
        velocity: torch.Tensor = self._modules.denoiser(latents.to(self._dtype), times, conditions)
        return velocity.float()

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae: Any = self._modules.decoder
        images: torch.Tensor = vae.decode(
            latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
        )[0]
        return images


def _first(card: ModelCard, folder: Path, pattern: str, names: Sequence[str]) -> str:
    """Return the first of a model's folders that holds a file of that pattern."""
    for name in names:
        if any((folder / name).glob(pattern)):
            return name
    raise ModelCardError(
        f"model {card.name}: none of {', '.join(str(folder / name) for name in names)} has a {pattern}; fetch the weights again "
        f"(pickles are not read)"
    )
