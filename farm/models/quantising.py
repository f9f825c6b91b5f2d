"""Parts that bitsandbytes quantises as they load: what is asked of it, what stays whole, and the same weights in full again.

A quantised weight is a parameter with a state beside it, its scales; `farm.models.device.Part` moves both. Nothing computes
with other weights than those that were loaded: bitsandbytes would lay them out anew, with coarser scales, when a processor
with AVX512-BF16 first uses them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farm.needs import NF4_BLOCK


def settings(how: str, kind: Any, folder: Path, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings of a BitsAndBytesConfig. `kind`: the class of diffusers or transformers that `folder` describes."""
    if how == "nf4":
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
            "llm_int8_skip_modules": whole_layers(kind, folder) or None,
        }
    # It would say for every layer of every step that inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"load_in_8bit": True}


def whole_layers(kind: Any, folder: Path) -> list[str]:
    """Return the layers that nf4 leaves whole, where any has rows of no whole blocks."""
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            model, others = kind.from_config(kind.load_config(folder, local_files_only=True)), []
        else:
            model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            others = get_keys_to_not_convert(model)  # transformers adds them where it is told of none
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    uneven = [name for name, layer in layers if layer.in_features % NF4_BLOCK]
    return [*uneven, *others] if uneven else []


@contextmanager
def without_gpu() -> Iterator[None]:
    """Let diffusers quantise on a CPU, which it refuses although bitsandbytes can. In the whole process: one thread at a time."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    kinds: tuple[Any, ...] = (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer)
    checks = [kind.validate_environment for kind in kinds]
    for kind in kinds:
        kind.validate_environment = lambda *given, **named: None
    try:
        yield
    finally:
        for kind, check in zip(kinds, checks, strict=True):
            kind.validate_environment = check


def keep_layout(module: nn.Module) -> None:
    """Have quantised layers compute on a CPU with the weights as they are."""
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def in_full(module: nn.Module, dtype: torch.dtype) -> None:
    """Put plain layers with the same weights, dequantised once, in place of those in nf4: what is left of the difference between
    the two is the kernels' rounding."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in list(module.named_modules()):
        if isinstance(layer, Linear4bit):
            with torch.device("meta"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            module.set_submodule(name, plain)
