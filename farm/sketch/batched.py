"""A fast forward pass over the library's transformer and text encoder, for training.

The library's own pass takes lists, rotates complex numbers and pads item by item. This one takes batches whose captions
share a padded length and gives the same numbers (`tests/unit/sketch/test_batched.py` holds it to 1e-5).
"""

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

PATCH = 2
CAPTION_MULTIPLE = 32
"""The library pads captions to multiples of this."""


class RealRotaryAttention:
    """An attention processor with real-valued rotary embedding and plain softmax."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        heads = (attn.heads, -1)
        query = _rotate(attn.norm_q(attn.to_q(hidden_states).unflatten(-1, heads)), freqs_cis).transpose(1, 2)
        key = _rotate(attn.norm_k(attn.to_k(hidden_states).unflatten(-1, heads)), freqs_cis).transpose(1, 2)
        value = attn.to_v(hidden_states).unflatten(-1, heads).transpose(1, 2)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        mixed = scores.softmax(dim=-1) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    cosine, sine = angles.to(heads.dtype).unbind(0)
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


class BatchedModel(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Text encoder and transformer in one pass: token ids and noisy latents to velocities."""

    def __init__(self, transformer: ZImageTransformer2DModel, text_encoder: Qwen3Model) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
            block.attention.set_processor(RealRotaryAttention())

    def forward(self, patches: Tensor, time: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Velocities for patches.

        `patches` is (batch, tokens, values) from `patchify`, `time` is 1 - sigma, `ids` is (batch, padded length) and
        `lengths` counts the real tokens of each caption. The padded length is a multiple of `CAPTION_MULTIPLE`.
        """
        transformer = self.transformer
        image_angles, caption_angles = self._angles(patches.shape[1], ids.shape[1], patches.device)
        modulation = transformer.t_embedder(time * transformer.t_scale)
        image = transformer.all_x_embedder["2-1"](patches)
        for block in transformer.noise_refiner:
            image = block(image, None, image_angles, modulation)
        caption = transformer.cap_embedder(self._encode(ids))
        real = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).unsqueeze(-1)
        caption = torch.where(real, caption, transformer.cap_pad_token.to(caption.dtype))
        for block in transformer.context_refiner:
            caption = block(caption, None, caption_angles)
        joint = torch.cat((image, caption.to(image.dtype)), dim=1)
        joint_angles = torch.cat((image_angles, caption_angles), dim=1)
        for block in transformer.layers:
            joint = block(joint, None, joint_angles, modulation)
        return transformer.all_final_layer["2-1"](joint[:, : patches.shape[1]], modulation)

    def _encode(self, ids: Tensor) -> Tensor:
        """The output of the first layer: what `hidden_states[-2]` is in a model of two."""
        encoder = self.text_encoder
        hidden = encoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        rotary = encoder.rotary_emb(hidden, positions[None])
        causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), device=ids.device).triu(1)
        return encoder.layers[0](hidden, attention_mask=causal[None, None], position_embeddings=rotary)

    def _angles(self, tokens: int, caption_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (2, tokens, 1, half a head), of the positions that the library gives."""
        side = int(tokens**0.5)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        start = torch.full((tokens,), caption_length + 1)
        image = torch.stack((start, rows.flatten(), columns.flatten()), dim=-1)
        caption = torch.zeros(caption_length, 3, dtype=torch.long)
        caption[:, 0] = torch.arange(1, caption_length + 1)
        return self._rotary(image, device), self._rotary(caption, device)

    def _rotary(self, positions: Tensor, device: torch.device) -> Tensor:
        theta, sizes = self.transformer.rope_theta, self.transformer.axes_dims
        angles = [
            positions[:, axis, None].double() / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
            for axis, size in enumerate(sizes)
        ]
        joined = torch.cat(angles, dim=-1).float()
        return torch.stack((joined.cos(), joined.sin()))[:, :, None].to(device)


def patchify(latents: Tensor) -> Tensor:
    """Latents (batch, channels, height, width) as tokens in the library's order."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, PATCH * PATCH * channels)


def pad_ids(captions: list[list[int]], *, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids padded to the library's multiple, and the lengths before."""
    lengths = torch.tensor([len(ids) for ids in captions])
    longest = -(-int(lengths.max()) // CAPTION_MULTIPLE) * CAPTION_MULTIPLE
    return torch.tensor([ids + [pad] * (longest - len(ids)) for ids in captions]), lengths
