"""Linear layers for a CPU in float32: weights laid out once as oneDNN wants them, SiLU and gate in the same pass.

Some 12 % of a batch of sketch by `python -m farm.bench.throughput`. These are the operators that torch's own compiler
emits where a C++ compiler is at hand; most machines have none. Results differ from the plain layers by rounding.
"""

from typing import Any, Protocol

import torch
from torch import nn


class _Gated(Protocol):
    """Diffusers' feed-forward of Z-Image and Lumina2: w2(silu(w1 x) * w3 x)."""

    w1: nn.Linear
    w2: nn.Linear
    w3: nn.Linear


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine gains by it: float32 on an x86 CPU, with oneDNN in torch."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    plain = device.type == "cpu" and dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available() and capability.startswith("AVX")


def pack_block(block: Any) -> None:
    """Replace the linear layers of one transformer block, which can then only compute; the plain weights are let go."""
    with torch.inference_mode():
        attention = block.attention
        attention.to_q = PackedLinear(attention.to_q)
        attention.to_k = PackedLinear(attention.to_k)
        attention.to_v = PackedLinear(attention.to_v)
        attention.to_out[0] = PackedLinear(attention.to_out[0])
        block.feed_forward = PackedFeedForward(block.feed_forward)


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


class PackedFeedForward(nn.Module):  # type: ignore[misc]
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, plain: _Gated):
        super().__init__()
        self.w1 = PackedLinear(plain.w1, "swish")
        self.w2 = PackedLinear(plain.w2)
        self.w3 = PackedLinear(plain.w3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Tokens x features in and out, with any leading dimensions."""
        gate = self.w1(inputs)
        hidden = torch.ops.mkldnn._linear_pointwise.binary(inputs, gate, self.w3.packed, self.w3.bias, "mul")
        out: torch.Tensor = self.w2(hidden)
        return out
