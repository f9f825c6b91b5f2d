"""What makes a denoiser quicker at the price of its rounding: compiled blocks, an attention kernel.

Bytes follow from the card and a picture's shape, never from what was drawn before: blocks are compiled while the model
loads, for any size, over pictures that are the same for all cards, with kernels chosen by rule and not by a race between them. A
shape that what was compiled does not take, and there should be none, is computed as if nothing had been compiled.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import nn

from farm.cardparts import PLAIN, Acceleration, Attention
from farm.errors import ModelCardError

COMPILER: Mapping[str, Any] = {"backend": "inductor", "options": {"deterministic": True}}
"""What compiles. Deterministic: kernels are chosen by rule, not by a race on the device, whose winner would decide bytes."""
WITHOUT_MASKS: frozenset[Attention] = frozenset({"_native_flash", "flash", "_flash_3", "sage"})
"""Kernels that refuse masks (diffusers/models/attention_dispatch.py)."""
GRAPHS = 4096
"""Compiled variants of one block's code that torch keeps: guided or not, with a mask or without, of one picture or several, for
each card that this process has had, since adapters differ too. One more fails to load, and is not computed otherwise."""


def accelerate(model: str, denoiser: nn.Module, how: Acceleration) -> None:
    """Prepare a denoiser that is loaded and was not used yet. Raises ModelCardError for what cannot be had here."""
    _set_attention(model, denoiser, how.attention)
    if how.compile:
        _compile(model, denoiser)


@contextmanager
def compiling() -> Iterator[None]:
    """Let blocks be compiled within; nothing is compiled elsewhere. One thread at a time."""
    # Two sides that happen to be equal in the pictures drawn meanwhile are not taken to be equal in all.
    unequal = torch.fx.experimental._config.patch(use_duck_shape=False)
    with torch.compiler.set_stance("default"), unequal, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Torchinductor does not support code generation for complex operators"
        )
        yield


def _compile(model: str, denoiser: nn.Module) -> None:
    repeated = tuple(getattr(denoiser, "_repeated_blocks", None) or ())
    blocks = [module for module in denoiser.modules() if type(module).__name__ in repeated]
    if not blocks:
        raise ModelCardError(
            f"model {model}: {type(denoiser).__name__} names no repeated blocks to compile; take compile out of the card"
        )
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.compiler.set_stance("eager_on_recompile")
    for block in blocks:
        block.compile(dynamic=True, **COMPILER)


def _set_attention(model: str, denoiser: nn.Module, name: Attention) -> None:
    """Set it in the modules: diffusers' own switch is one for the whole process."""
    backend = attention_dispatch.AttentionBackendName(name)
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as exc:
        raise ModelCardError(
            f"model {model}: attention {name} cannot be used here: {exc}; install it, or take another kernel and "
            f"give the job a new name"
        ) from exc
    processors = [processor for module in denoiser.modules() if (processor := getattr(module, "processor", None))]
    found = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    if not found and name != PLAIN.attention:
        raise ModelCardError(f"model {model}: {type(denoiser).__name__} has no choice of attention; leave it out")
    for processor in found:
        processor._attention_backend = backend
    if name in WITHOUT_MASKS:
        for module in denoiser.modules():
            if isinstance(getattr(module, "processor", None), ZSingleStreamAttnProcessor):
                module.processor = MaskedNatively(module.processor)


class MaskedNatively(ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """Z-Image's attention with a kernel that takes no masks, and torch's own where there is one.

    There is with guidance, where a prompt and its negative one are not of one length.
    """

    def __init__(self, without_masks: ZSingleStreamAttnProcessor):
        super().__init__()
        self._without_masks = without_masks
        self._attention_backend = attention_dispatch.AttentionBackendName(PLAIN.attention)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments as diffusers', which looks them up by their names."""
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        out: torch.Tensor = self._without_masks(*given) if attention_mask is None else super().__call__(*given)
        return out
