"""Tiny models of which a part is quantised, and what that part computes; for tests on a CPU and on a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farm.bench.gpufidelity import states_of
from farm.bench.precision import write_gguf
from farm.cardparts import Denoiser
from farm.modelcard import ModelCard
from farm.models.diffusion import DiffusionFamily
from farm.models.family import open_family
from tests.drawing import card, numerics, spec, write_tiny_zimage
from tests.newbie import write_tiny_newbie
from tests.tiny_qwen import write_tiny_qwen

PROMPT = "a red circle on white"


@dataclass(frozen=True)
class Case:
    """A part of a family's tiny model, and how it is quantised."""

    family: str
    part: str
    how: str

    def __str__(self) -> str:
        return f"{self.family} {self.part} {self.how}"


CASES = [
    Case("newbie", "encoder", "nf4"),
    Case("newbie", "encoder", "int8"),
    Case("qwen-image", "encoder", "nf4"),
    Case("qwen-image", "denoiser", "nf4"),
    Case("qwen-image", "denoiser", "gguf"),
    Case("z-image", "encoder", "nf4"),
    Case("z-image", "encoder", "int8"),
    Case("z-image", "denoiser", "nf4"),
    Case("z-image", "denoiser", "int8"),
    Case("z-image", "denoiser", "gguf"),
]
LEAST_COSINE = {"nf4": 0.93, "int8": 0.995, "gguf": 0.99}
"""Measured on these models: 0.953 and more for nf4, 0.9992 for int8, 0.996 for GGUF."""
LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "gguf": "GGUFLinear"}


def write_models(folder: Path) -> dict[str, Path]:
    """Write each family's tiny model, of layers that are wide enough to be quantised, and its denoiser as GGUF."""
    models = {
        "newbie": write_tiny_newbie(folder / "newbie", wide=True),
        "qwen-image": write_tiny_qwen(folder / "qwen-image", wide=True),
        "z-image": write_tiny_zimage(folder / "z-image", wide=True),
    }
    for family in ("qwen-image", "z-image"):
        where = models[family]
        write_gguf(where / "transformer", where / "q4.gguf", kind="Q4_0", architecture=family.replace("-", "_"))
    return models


def card_of(models: dict[str, Path], case: Case, *, whole: bool = False, **changes: Any) -> ModelCard:
    """A card of a case; `whole`: of the same model with nothing quantised."""
    where = models[case.family]
    fields: dict[str, Any] = {"family": case.family, "dtypes": {"cpu": ("float32",), "cuda": ("float32",)}}
    fields["batch"] = {"cpu": 4, "cuda": 4}
    if not whole and case.how == "gguf":
        fields["denoiser"] = Denoiser(path=str(where), file="q4.gguf", format="gguf")
    elif not whole:
        fields["quantise"] = {case.part: case.how}
    return card(where, **fields | changes)


def loaded(card: ModelCard, *, device: str = "cpu", dtype: str = "float32") -> DiffusionFamily:
    """A family with what its card says quantised, on a CPU too."""
    kind = device.partition(":")[0]
    family = open_family(card, numerics(device=kind, dtype=dtype), device=device, vram_gib=16.0, quantises=True)
    assert isinstance(family, DiffusionFamily)
    family.load()
    return family


def computed(family: DiffusionFamily, part: str) -> torch.Tensor:
    """What a part makes of one prompt: each token's states, or how a picture differs from its noise, as rows of float32."""
    if part == "encoder":
        return states_of(family, PROMPT)
    prompt = [family.encode(family.tokenize(PROMPT))]
    specs = [spec(0)]
    noise = family.noise(specs)
    latents = family.denoise(specs, noise, positive=prompt, negative=prompt, on_step=lambda step, steps: None)
    return (latents.float().cpu() - noise).flatten(1)


def module_of(family: DiffusionFamily, part: str) -> nn.Module:
    """A part's module."""
    module: nn.Module = getattr(family._modules, part)
    return module


def quantised_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module whose weights are quantised, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer).__name__ in LAYERS.values() and layer.weight.dtype in (torch.uint8, torch.int8)
    }


def cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the row that is furthest from the other's."""
    return float(nn.functional.cosine_similarity(ours, theirs, dim=-1).min())


def shuffle(layers: dict[str, Any]) -> None:
    """Put each layer's weights into another order; their scales and how they are spread stay."""
    for layer in layers.values():
        given = layer.weight.data
        if type(layer).__name__ == "GGUFLinear":  # Q4_0: a half for a scale, and 16 bytes of weights
            given = given.as_subclass(torch.Tensor).view(-1, 18)[:, 2:]
        order = torch.randperm(given.numel(), generator=torch.Generator().manual_seed(0))
        given.copy_(given.flatten()[order].view_as(given))
