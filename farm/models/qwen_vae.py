"""Qwen-Image's VAE, its decoder folded for a single frame.

The VAE is one for video: its convolutions look back in time, over a cache of features. Of one frame's past there are only
zeros, so the last slice of each kernel is all that ever meets a number, and a 2D convolution with it gives the same sums. The
cache goes, and with it more than half of a decode's memory; steps that double the frames are left out for the first frame by
the stock decoder too. Results differ from the stock decoder's by rounding (tested). It uses the stock decoder's layers and
order: a new diffusers must pass that test.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageRMS_norm,
)
from torch import nn


class FrameDecoder(nn.Module):  # type: ignore[misc]
    """Decodes pictures. Takes the decoder out of `vae`, which can then no longer decode."""

    mean: torch.Tensor
    inverse_std: torch.Tensor

    def __init__(self, vae: AutoencoderKLQwenImage):
        super().__init__()
        config = vae.config
        self.scale_factor = 2 ** len(config.temperal_downsample)
        self.post_quant_conv = _flat(vae.post_quant_conv)
        self.decoder = vae.decoder
        _fold(self.decoder)
        sides = (1, config.z_dim, 1, 1)
        mean, inverse_std = torch.tensor(config.latents_mean), 1.0 / torch.tensor(config.latents_std)
        self.register_buffer("mean", mean.view(sides).to(vae.dtype), persistent=False)
        self.register_buffer("inverse_std", inverse_std.view(sides).to(vae.dtype), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser leaves them, images x channels x height x width, to images x 3 x height x width in -1..1."""
        scaled = latents.to(self.mean.dtype) / self.inverse_std + self.mean
        return self.decoder(self.post_quant_conv(scaled)).clamp(min=-1.0, max=1.0)


def _fold(module: nn.Module) -> None:
    """Replace, in a module and below, what works on frames by what works on one."""
    for name, child in module.named_children():
        folded: Any = None
        if isinstance(child, QwenImageCausalConv3d):
            folded = _flat(child)
        elif isinstance(child, QwenImageAttentionBlock):
            folded = _FrameAttention(child)
        elif isinstance(child, QwenImageResample):
            folded = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), child.resample[1])
        elif isinstance(child, QwenImageRMS_norm):
            child.gamma.data = child.gamma.data.flatten(1)[..., None] if child.gamma.dim() == 4 else child.gamma.data
        else:
            _fold(child)
        if folded is not None:
            module.register_module(name, folded)


def _flat(conv: QwenImageCausalConv3d) -> nn.Conv2d:
    """The convolution that one frame meets: padding is before it in time, so it lies under the kernel's last slice."""
    left, _, top, _, _, _ = conv._padding
    with torch.device("meta"):
        flat = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size[1:], stride=conv.stride[1:], padding=(top, left)
        )
    flat.weight = nn.Parameter(conv.weight.data[:, :, -1].clone(), requires_grad=False)
    flat.bias = conv.bias
    return flat


class _FrameAttention(nn.Module):  # type: ignore[misc]
    """The stock attention of one head over the places of one frame."""

    def __init__(self, stock: QwenImageAttentionBlock):
        super().__init__()
        self.norm, self.to_qkv, self.proj = stock.norm, stock.to_qkv, stock.proj

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = hidden.shape
        qkv = self.to_qkv(self.norm(hidden)).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        query, key, value = qkv.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value).squeeze(1).transpose(1, 2)
        out: torch.Tensor = hidden + self.proj(mixed.reshape(batch, channels, height, width))
        return out
