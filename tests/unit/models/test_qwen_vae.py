"""Qwen's VAE decoder for one frame against the stock one, on random weights."""

import copy

import pytest
import torch

from farm.models.qwen_vae import FrameDecoder
from tests.tiny_qwen import tiny_vae


def stock_decode(latents: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What QwenImagePipeline does with latents before it makes pixels of them."""
    vae = tiny_vae().to(dtype)
    latents = latents.to(dtype).unsqueeze(2)
    mean = torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1).to(dtype)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1).to(dtype)
    return vae.decode(latents / std + mean, return_dict=False)[0][:, :, 0]


@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=["square", "wide"])
@torch.no_grad()
def test_one_frame_decodes_as_the_stock_decoder_does_it_but_for_rounding(size: tuple[int, int]) -> None:
    latents = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(5))
    ours = FrameDecoder(tiny_vae())(latents)
    expected = stock_decode(latents)
    assert ours.shape == (3, 3, 8 * size[0], 8 * size[1])
    assert expected.std() > 0.01
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_bfloat16_is_denormalised_in_the_stock_pipelines_order() -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6)) * 3
    folded = FrameDecoder(tiny_vae().to(torch.bfloat16))
    assert folded(latents).dtype == torch.bfloat16
    assert torch.allclose(folded(latents).float(), stock_decode(latents, torch.bfloat16).float(), atol=0.05)


def test_a_folded_decoder_has_a_third_of_the_weights_and_none_for_time() -> None:
    vae = tiny_vae()
    whole = sum(tensor.numel() for tensor in copy.deepcopy(vae.decoder).parameters())
    folded = FrameDecoder(vae)
    assert sum(tensor.numel() for tensor in folded.parameters()) < 0.45 * whole
    assert all(tensor.dim() <= 4 for tensor in folded.parameters())
    assert not [name for name, _ in folded.named_modules() if "time_conv" in name]
