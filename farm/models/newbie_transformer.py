"""NewBie's denoiser: diffusers' Lumina2 transformer with a pooled caption vector in its modulation.

What is the same at every step is computed once a batch: refined captions, positions, the mask, the pooled vectors. Nothing
of a batch is kept in the module; it is all in the `Conditions` that the caller holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.normalization import RMSNorm
from torch import nn


@dataclass(frozen=True, slots=True)
class Caption:
    """An encoded prompt. `states`: tokens x features; `pooled`: a vector, None for a plain Lumina2."""

    states: torch.Tensor
    pooled: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Conditions:
    """What one batch keeps from its first step to its last. `mask` is None where all captions are of one length."""

    captions: torch.Tensor
    pooled: torch.Tensor | None
    image_positions: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None


class NewBieTransformer(Lumina2Transformer2DModel):  # type: ignore[misc]
    """Lumina2 and a pooled vector of `pooled_dim`: normalised and projected, joined to the time's embedding, projected back.

    Call `prepare` once a batch and the model at each step. The stock tables of positions and their limit on a caption's
    length are not used: positions are computed for the batch.
    """

    _repeated_blocks = ("Lumina2TransformerBlock",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2304,
        num_layers: int = 36,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 24,
        num_kv_heads: int = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        scaling_factor: float = 1.0,
        axes_dim_rope: tuple[int, int, int] = (32, 32, 32),
        axes_lens: tuple[int, int, int] = (1024, 512, 512),
        cap_feat_dim: int = 2560,
        pooled_dim: int = 1024,
    ):
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_refiner_layers=num_refiner_layers,
            num_attention_heads=num_attention_heads,
            num_kv_heads=num_kv_heads,
            multiple_of=multiple_of,
            ffn_dim_multiplier=ffn_dim_multiplier,
            norm_eps=norm_eps,
            scaling_factor=scaling_factor,
            axes_dim_rope=axes_dim_rope,
            axes_lens=axes_lens,
            cap_feat_dim=cap_feat_dim,
        )
        modulation = min(hidden_size, 1024)
        self.clip_text_pooled_proj = nn.Sequential(RMSNorm(pooled_dim, eps=norm_eps), nn.Linear(pooled_dim, pooled_dim))
        self.time_text_embed = nn.Sequential(nn.SiLU(), nn.Linear(modulation + pooled_dim, modulation))

    def prepare(self, captions: Sequence[Caption], *, height: int, width: int) -> Conditions:
        """Refine captions, of any lengths, for latents of `height` x `width`. All pooled vectors are there, or none."""
        weight = self.x_embedder.weight
        lengths = [len(caption.states) for caption in captions]
        states = nn.utils.rnn.pad_sequence([caption.states for caption in captions], batch_first=True)
        hidden = self.time_caption_embed.caption_embedder(states.to(weight.device, weight.dtype))
        longest = max(lengths)
        ends = torch.tensor(lengths)
        mask = None
        if min(lengths) < longest:
            mask = (torch.arange(longest) < ends[:, None]).to(weight.device)
        caption_positions, image_positions = self._positions(ends, longest, height, width)
        for layer in self.context_refiner:
            hidden = layer(hidden, mask, caption_positions)
        if mask is not None:
            image = mask.new_ones((len(captions), image_positions.shape[1]))
            mask = torch.cat([mask, image], dim=1)
        pooled = None
        vectors = [caption.pooled for caption in captions if caption.pooled is not None]
        if vectors:
            pooled = self.clip_text_pooled_proj(torch.stack(vectors).to(weight.device, weight.dtype))
        return Conditions(
            captions=hidden,
            pooled=pooled,
            image_positions=image_positions,
            positions=torch.cat([caption_positions.expand(len(captions), -1, -1), image_positions], dim=1),
            mask=mask,
        )

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, conditions: Conditions | Sequence[Caption]
    ) -> torch.Tensor:
        """Predict the velocity towards the picture. `latents`: batch x channels x height x width; `time`: batch, 0 is noise.

        Captions that were not prepared are prepared here, and not kept.
        """
        batch, channels, height, width = latents.shape
        if not isinstance(conditions, Conditions):
            conditions = self.prepare(conditions, height=height, width=width)
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        embed = self.time_caption_embed
        modulation = embed.timestep_embedder(embed.time_proj(time).type_as(latents))
        if conditions.pooled is not None:
            modulation = self.time_text_embed(torch.cat([modulation, conditions.pooled], dim=-1))

        patches = latents.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        hidden = self.x_embedder(patches.reshape(batch, rows * columns, -1))
        for layer in self.noise_refiner:
            hidden = layer(hidden, None, conditions.image_positions, modulation)
        hidden = torch.cat([conditions.captions, hidden], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, conditions.mask, conditions.positions, modulation)
        hidden = self.norm_out(hidden[:, conditions.captions.shape[1] :], modulation)
        out: torch.Tensor = hidden.view(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(batch, -1, height, width)

    def _positions(
        self, ends: torch.Tensor, longest: int, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations of captions (1 x tokens x features) and images (batch x tokens x features).

        A caption's tokens are numbered; a picture's all bear the caption's end, and their row and column.
        """
        patch = self.config.patch_size
        rows, columns = torch.arange(height // patch), torch.arange(width // patch)
        captions = self._rotations(torch.arange(longest), torch.zeros(longest), torch.zeros(longest))
        grid = torch.cartesian_prod(rows, columns)
        images = [self._rotations(torch.full((len(grid),), int(end)), grid[:, 0], grid[:, 1]) for end in ends]
        return captions[None], torch.stack(images)

    def _rotations(self, *axes: torch.Tensor) -> torch.Tensor:
        """Angles in double, as the stock tables have them; the rotations in single, which is what they turn."""
        parts: list[Any] = [
            get_1d_rotary_pos_embed(width, axis, theta=self.rope_embedder.theta, freqs_dtype=torch.float64)
            for width, axis in zip(self.config.axes_dim_rope, axes, strict=True)
        ]
        return torch.cat(parts, dim=-1).to(self.x_embedder.weight.device, torch.complex64)
