"""Z-Image's transformer blocks for a CPU in float32: weights laid out once as oneDNN wants them, one short forward.

Of the transformer's time a quarter to a third goes in a batch of eight of sketch, a tenth for a single image. Linear layers
are the operators that torch's own compiler emits where a C++ compiler is at hand; most machines have none. Tensors are let
go of as soon as they are used, so that a batch stays in the processor's cache. Results differ from the stock blocks by
rounding (tested).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine gains by it: float32 on an x86 CPU, with oneDNN in torch."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    plain = device.type == "cpu" and dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available() and capability.startswith("AVX")


def pack_blocks(blocks: nn.ModuleList) -> None:
    """Replace stock ZImageTransformerBlocks, which can only compute then; their plain weights are let go."""
    with torch.inference_mode():
        for place, block in enumerate(blocks):
            blocks[place] = PackedBlock(block)


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer; `activation` is "none" or oneDNN's name of one that follows it."""

    def __init__(self, linear: nn.Linear, activation: str = "none"):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias
        self._activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Tokens x features in, tokens x outputs out, with any leading dimensions."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, self._activation, [], "")
        return out


class PackedBlock(nn.Module):  # type: ignore[misc]
    """Attention and feed-forward of one block, each normed before and after, scaled and gated by the step's modulation."""

    def __init__(self, block: Any):
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self._heads = attention.heads
        self._to_q = PackedLinear(attention.to_q)
        self._to_k = PackedLinear(attention.to_k)
        self._to_v = PackedLinear(attention.to_v)
        self._to_out = PackedLinear(attention.to_out[0])
        self._norm_q = _Norm(attention.norm_q)
        self._norm_k = _Norm(attention.norm_k)
        self._gate = PackedLinear(feed_forward.w1, "swish")
        self._up = PackedLinear(feed_forward.w3)
        self._down = PackedLinear(feed_forward.w2)
        self._before_attention = _Norm(block.attention_norm1)
        self._after_attention = _Norm(block.attention_norm2)
        self._before_feed = _Norm(block.ffn_norm1)
        self._after_feed = _Norm(block.ffn_norm2)
        self._modulation = block.adaLN_modulation if block.modulation else None

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: torch.Tensor,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`hidden`: batch x tokens x features; `mask`: batch x tokens, True where there is one; `rotary`: complex, as stock."""
        if mask is not None:
            mask = mask[:, None, None, :]
        rotary = rotary.unsqueeze(2)
        if self._modulation is None:
            hidden = hidden + self._after_attention(self._attend(self._before_attention(hidden), mask, rotary))
            return hidden + self._after_feed(self._feed(self._before_feed(hidden)))
        scale, gate, feed_scale, feed_gate = self._modulation(modulation).unsqueeze(1).chunk(4, dim=2)
        hidden = hidden + gate.tanh() * self._after_attention(
            self._attend(self._before_attention(hidden) * (1.0 + scale), mask, rotary)
        )
        return hidden + feed_gate.tanh() * self._after_feed(self._feed(self._before_feed(hidden) * (1.0 + feed_scale)))

    def _attend(self, hidden: torch.Tensor, mask: torch.Tensor | None, rotary: torch.Tensor) -> torch.Tensor:
        heads = (*hidden.shape[:2], self._heads, -1)
        query = _rotated(self._norm_q(self._to_q(hidden).view(heads)), rotary)
        key = _rotated(self._norm_k(self._to_k(hidden).view(heads)), rotary)
        value = self._to_v(hidden).view(heads)
        seen = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        del query, key, value
        out: torch.Tensor = self._to_out(seen.transpose(1, 2).flatten(2))
        return out

    def _feed(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = torch.ops.mkldnn._linear_pointwise.binary(
            hidden, self._gate(hidden), self._up.packed, self._up.bias, "mul"
        )
        out: torch.Tensor = self._down(gated)
        return out


class _Norm:
    """Root mean square over the last dimension, by the operations that are fastest on a CPU."""

    def __init__(self, norm: Any):
        self._weight: torch.Tensor = norm.weight.detach()
        self._eps: float = norm.eps

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + self._eps) * self._weight


def _rotated(inputs: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(inputs.view(*inputs.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotary).flatten(3)
