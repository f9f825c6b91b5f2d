"""What the cards of each family of models may have. How a family renders is `farm/models/`' affair; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from farm.yamlfile import did_you_mean, shown


@dataclass(frozen=True, slots=True)
class Takes:
    """What a family knows what to do with. `options`: what not every family has, and its kind or its values; `any_option`:
    others are for its code to judge, once the model is loaded. `code`: Python files that come with the weights. `pixels`: raised
    whenever the farm's own arithmetic gives a family's pictures other pixels; plans that name another are refused."""

    options: Mapping[str, type | tuple[str, ...]] = field(default_factory=dict)
    denoiser: tuple[str, ...] = ()
    decoder: bool = False
    adapters: bool = False
    scheduler: bool = False
    quantise: tuple[str, ...] = ()
    acceleration: tuple[str, ...] = ()
    any_option: bool = False
    code: bool = False
    pixels: int = 1


_PLACED: dict[str, type | tuple[str, ...]] = {"encoder_on": ("cpu",)}
_ALL = Takes(
    options=_PLACED,
    denoiser=("gguf", "safetensors"),
    decoder=True,
    adapters=True,
    scheduler=True,
    quantise=("encoder", "denoiser"),
    acceleration=("compile", "attention", "first_block_cache"),
)
FAMILIES = {
    "z-image": _ALL,
    "qwen-image": _ALL,
    # Its loop is its authors' own flow solver, and its denoiser a module of ours that reads two layouts of checkpoints by tensor
    # names: nothing of diffusers' schedulers, adapters and GGUF files applies to it.
    "newbie": Takes(
        options=_PLACED | {"shift": float, "cfg_truncation": float, "cfg_renormalisation": float, "system_prompt": str},
        denoiser=("safetensors",),
        decoder=True,
        quantise=("encoder",),
        acceleration=("compile",),
    ),
    "diffusers": replace(_ALL, options={}, acceleration=(), any_option=True, code=True),
    "sleep": Takes(),
}
"""Family -> what its cards may have."""

_KINDS = {float: "a number", str: "text"}


def option_fault(family: str, name: str, value: bool | int | float | str) -> str | None:
    """Return what is wrong with an option of a card, by the family's table alone, or None."""
    options = FAMILIES[family].options
    if name not in options and FAMILIES[family].any_option:
        return None
    if name not in options:
        known = f"; it has {', '.join(options)}" if options else ", which has none"
        return f"is no option of the family {family}{did_you_mean(name, list(options)) or known}"
    kind = options[name]
    if isinstance(kind, tuple):
        return None if value in kind else f"must be {', '.join(kind)}, got {shown(value)}; change it"
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        return f"must be {_KINDS[kind]}, got {shown(value)}; change it"
    return None
