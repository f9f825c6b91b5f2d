"""What decides bytes, by name and version: packages, and each family's own arithmetic.

Knows nothing of plans: `farm/devices.py` writes versions into them, `farm/engine.py` holds a renderer to them.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from farm.families import FAMILIES
from farm.modelcard import ModelCard

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "pillow")
"""What every card's bytes depend on: how prompts are cut, how pixels are computed, how they become a file."""
KERNELS: Mapping[str, str] = {
    "flash": "flash-attn",
    "_flash_3": "flash-attn-3",
    "sage": "sageattention",
    "xformers": "xformers",
}
"""Attention kernel -> the package that has it; the others are torch's own."""
NONE = "none"
"""The version of what is not installed."""
_OWN = {f"farm-{family}": str(takes.pixels) for family, takes in FAMILIES.items()}
"""How the farm itself computes each family's pixels: its revision stands in a plan as a package's version does."""


def versions_for(card: ModelCard, device: Literal["cuda", "cpu"]) -> dict[str, str]:
    """Return what decides the bytes of a card's pictures on one kind of device, with the versions that are here.

    A package of PACKAGES must be here. One that some cards alone use is left out where it is not: a machine that only plans need
    not have it, and renderers with any version of it may take the plan.
    """
    return completed({package: version(package) for package in PACKAGES}, card, device)


def completed(versions: Mapping[str, str], card: ModelCard, device: Literal["cuda", "cpu"]) -> dict[str, str]:
    """Return versions with what they do not name of a card's own, where it is here."""
    here = {package: installed(package) for package in _used_by(card, device) if package not in versions}
    return {**versions, **{package: found for package, found in here.items() if found != NONE}}


def installed(package: str) -> str:
    """Return the version that is here, or NONE."""
    if package in _OWN:
        return _OWN[package]
    try:
        return version(package)
    except PackageNotFoundError:
        return NONE


def of_the_farm(package: str) -> bool:
    """Whether it is no package that could be installed but a part of the farm."""
    return package in _OWN


def _used_by(card: ModelCard, device: Literal["cuda", "cpu"]) -> tuple[str, ...]:
    """What not every card uses."""
    used = {
        f"farm-{card.family}": True,
        "bitsandbytes": bool(card.quantise) and device == "cuda",
        "gguf": card.denoiser is not None and card.denoiser.format == "gguf",
        "peft": bool(card.adapters),
    }
    kernel = KERNELS.get(card.accelerated_on(device).attention)
    return (*(package for package, is_used in used.items() if is_used), *([kernel] if kernel else []))
