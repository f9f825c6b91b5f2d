"""Z-Image's transformer, with nothing computed twice: what is the same at every step once a batch, what is the same in
both halves of a guided batch once a step.

The stock forward embeds and refines the captions, and builds positions and masks, anew at each step; and with guidance it
refines the same noise once for the prompt and once for the negative one. This does the stock operations in their order, so
its output equals the stock one but for rounding (tested on the CPU). It uses the stock model's layers and private
preparation: a new diffusers must pass that test.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from farm.models.firstblock import FirstBlockCache, Streams

PATCH = 2


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one batch keeps from its first step to its last. `padding` marks tokens added up to a multiple of 32."""

    captions: torch.Tensor
    image_positions: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    padding: torch.Tensor | None


class StepTransformer(nn.Module):  # type: ignore[misc]
    """Stands in for the transformer in a ZImagePipeline. Call `forget` before each batch.

    `keeps`: what is the same at every step is computed once. Where blocks come and go it is not, since each step has to go
    through all of them in order; its numbers are the same. `cache`: leaves blocks out that come after picture and captions met.
    """

    def __init__(
        self, transformer: ZImageTransformer2DModel, *, keeps: bool = True, cache: FirstBlockCache | None = None
    ):
        super().__init__()
        self.transformer = transformer
        self._keeps = keeps
        self._cache = cache
        self._prepared: _Prepared | None = None
        self._guided = False

    @property
    def dtype(self) -> torch.dtype:
        """The stock model's dtype, which the pipeline asks for."""
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """The stock model's device, which the pipeline asks for."""
        return self.transformer.device

    @property
    def in_channels(self) -> int:
        """Latent channels, which the pipeline asks for."""
        return int(self.transformer.in_channels)

    @property
    def config(self) -> Any:
        """The stock model's configuration."""
        return self.transformer.config

    def forget(self, *, guided: bool = False) -> None:
        """Drop what was kept of the last batch. `guided`: the next one comes twice, with its prompts and its negative ones."""
        self._prepared = None
        self._guided = guided
        if self._cache is not None:
            self._cache.forget()

    def forward(
        self,
        images: list[torch.Tensor],
        timestep: torch.Tensor,
        captions: list[torch.Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[list[torch.Tensor]]:
        """Predict one step. `images`: channels x 1 x height x width each, all alike; `captions`: tokens x features."""
        model = self.transformer
        kept = self._prepared or self._prepare(images, captions)
        if self._keeps:
            self._prepared = kept
        # All images of a batch are at the same step: its modulation is one row.
        modulation = model.t_embedder(timestep[:1] * model.t_scale).type_as(images[0])

        if self._guided:  # both halves are the same images until they meet their captions
            images = images[: len(images) // 2]
        batch = len(images)
        _, frames, height, width = images[0].shape
        rows, columns = height // PATCH, width // PATCH
        patches = torch.stack(images).view(batch, -1, frames, 1, rows, PATCH, columns, PATCH)
        patches = patches.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, frames * rows * columns, -1)
        tokens = patches.shape[1]
        if kept.padding is not None:
            patches = torch.cat([patches, patches[:, -1:].repeat(1, len(kept.padding) - tokens, 1)], dim=1)
        hidden = model.all_x_embedder[f"{PATCH}-1"](patches.flatten(0, 1)).view(batch, patches.shape[1], -1)
        if kept.padding is not None:
            hidden = torch.where(kept.padding[None, :, None], model.x_pad_token, hidden)
        for layer in model.noise_refiner:
            hidden = layer(hidden, None, kept.image_positions[:batch], modulation)

        if self._guided:
            hidden, batch = hidden.repeat(2, 1, 1), 2 * batch
        hidden = torch.cat([hidden, kept.captions], dim=1)
        if self._cache is None:
            for layer in model.layers:
                hidden = layer(hidden, kept.mask, kept.positions, modulation)
        else:

            def block(layer: Any, streams: Streams) -> Streams:
                return (layer(*streams, kept.mask, kept.positions, modulation),)

            (hidden,) = self._cache.through(model.layers, (hidden,), block, tokens=tokens)
        out = model.all_final_layer[f"{PATCH}-1"](hidden, c=modulation)[:, :tokens]
        out = out.view(batch, frames, rows, columns, 1, PATCH, PATCH, -1)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)
        return (list(out.unbind(dim=0)),)

    def _prepare(self, images: list[torch.Tensor], captions: list[torch.Tensor]) -> _Prepared:
        model = self.transformer
        image_tokens, tokens, _, image_ids, ids, image_padding, padding = model.patchify_and_embed(
            images, captions, PATCH, 1
        )
        lengths = [len(caption) for caption in tokens]
        embedded = list(model.cap_embedder(torch.cat(tokens, dim=0)).split(lengths, dim=0))
        refined, positions, mask, _, _ = model._prepare_sequence(
            embedded, ids, padding, model.cap_pad_token, None, images[0].device
        )
        # For one caption torch leaves strides as they come, and compiled blocks look at them.
        positions = positions.clone(memory_format=torch.contiguous_format)
        for layer in model.context_refiner:
            refined = layer(refined, mask, positions)
        length = len(image_tokens[0])
        image_positions = torch.stack(model.rope_embedder(torch.cat(image_ids, dim=0)).split(length, dim=0))
        if mask is not None:
            # Past its own end the stock model pads a sequence with zeros, after joining picture and caption.
            refined = refined.masked_fill(~mask.unsqueeze(-1), 0)
            mask = torch.cat([mask.new_ones((len(images), length)), mask], dim=1)
        return _Prepared(
            captions=refined,
            image_positions=image_positions,
            positions=torch.cat([image_positions, positions], dim=1),
            mask=mask,
            padding=image_padding[0] if bool(image_padding[0].any()) else None,
        )
