"""Model cards: what a model is, where its weights lie, what it may be asked for, and its presets.

A card is YAML in `manifests/models/` (in an installed farm: `farm/cards/`) or in a folder of the user's own
(`FARM_MODELS`), which is searched first; the file's name is the card's name. Knows nothing of torch or of files of weights:
whether a card's weights are there and load is found out where they are loaded.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from farm.cardparts import (
    PACKAGE,
    PLAIN,
    Acceleration,
    Adapter,
    Card,
    Denoiser,
    Scheduler,
    SizeLimits,
    Source,
    check_code,
    check_source,
    wrong,
)
from farm.errors import ManifestError, ModelCardError, UnknownModelError
from farm.families import FAMILIES, option_fault
from farm.settings import Settings
from farm.yamlfile import did_you_mean, read_yaml, shown, validate

_NEGATIVE_NAME = re.compile(r"[^@\s]\S*")

HOW_TO_ADD = " (FARM_MODELS names a folder of more)"
"""How a message ends for who may set this machine's settings; the endpoint leaves it out."""


class RenderParams(Card):
    """What decides one picture besides its prompt and seed, under diffusers' names."""

    negative_prompt: str = ""
    width: int = Field(gt=0, description="pixels")
    height: int = Field(gt=0, description="pixels")
    num_inference_steps: int = Field(gt=0)
    guidance_scale: float = Field(ge=0)


class ParamOverrides(Card):
    """Some of RenderParams: presets, a manifest's params, one point of a sweep, a row's own columns."""

    negative_prompt: str | None = None
    width: int | None = Field(default=None, gt=0, description="pixels")
    height: int | None = Field(default=None, gt=0, description="pixels")
    num_inference_steps: int | None = Field(default=None, gt=0)
    guidance_scale: float | None = Field(default=None, ge=0)


AnySource = TypeVar("AnySource", bound="Source")
AnyOverrides = TypeVar("AnyOverrides", RenderParams, ParamOverrides, "Preset")


class Preset(ParamOverrides):
    """Parameters under a name."""

    warning: str | None = Field(
        default=None, description="said to whoever uses it: where it contradicts the model's authors"
    )


class ModelCard(Card):
    """One model. `dtypes` and `batch` are per device kind (`cuda`, `cpu`), the preferred dtype first."""

    name: str
    title: str
    family: Literal["z-image", "qwen-image", "newbie", "diffusers", "sleep"] = Field(
        description="which code in farm/models/ runs it"
    )
    source: Source
    denoiser: Denoiser | None = Field(default=None, description="in place of the source's own")
    decoder: Source | None = Field(default=None, description="a VAE in a folder of its own, in place of the source's")
    quantise: dict[Literal["encoder", "denoiser"], Literal["nf4", "int8"]] = Field(
        default={}, description="parts that are quantised as they are loaded on a GPU, by bitsandbytes"
    )
    adapters: tuple[Adapter, ...] = ()
    scheduler: Scheduler | None = Field(default=None, description="in place of the source's own")
    acceleration: dict[Literal["cuda", "cpu"], Acceleration] = Field(
        default={}, description="per device kind; what changes a picture by rounding or more, and saves time"
    )
    options: dict[str, bool | int | float | str] = Field(
        default={}, description="what only this family has; each family names its own"
    )
    code: dict[str, str] = Field(
        default={},
        description="Python files that come with the weights and are run: each name below the source's folder with the sha256 of "
        "its bytes",
    )
    licence: str
    licence_warning: str | None = Field(default=None, description="said to whoever renders with it")
    dtypes: dict[Literal["cuda", "cpu"], tuple[Literal["float32", "bfloat16", "float16"], ...]]
    batch: dict[Literal["cuda", "cpu"], int] = Field(description="images per batch of one shape")
    cpu_threads: int | None = Field(
        default=None,
        gt=0,
        description="torch threads for a batch on the CPU, all the renderer's cores where empty; with fewer, it renders several "
        "shards side by side, each with a copy of the model",
    )
    defaults: RenderParams
    limits: SizeLimits = SizeLimits()
    max_steps: int = Field(default=200, gt=0)
    max_sequence_length: int = Field(default=512, gt=0, description="prompt tokens kept")
    presets: dict[str, Preset] = Field(default={}, description="parameters by name")
    negative_prompts: dict[str, str] = Field(
        default={}, description="negative prompts by name; written as @NAME where one is asked for"
    )
    seconds_per_image: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="estimate at the defaults by device kind, where somebody measured one"
    )

    @field_validator("dtypes", "batch")
    @classmethod
    def _one_device_at_least(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise wrong("names no device; write one for cpu or cuda")
        for device, entry in value.items():
            if entry == () or (isinstance(entry, int) and entry < 1):
                raise wrong(f"must be at least one, got {shown(entry)}; change it", device)
        return value

    @field_validator("code")
    @classmethod
    def _can_be_imported(cls, value: dict[str, str]) -> dict[str, str]:
        check_code(value)
        return value

    @field_validator("negative_prompts")
    @classmethod
    def _can_be_asked_for(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _NEGATIVE_NAME.fullmatch(name):
                raise wrong(
                    f"{shown(name)} cannot be asked for as @NAME; a name has no blanks, does not begin with @ and is not empty: "
                    "rename it",
                    name,
                )
        return value

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        for at, source in self._sources():
            check_source(at, source, nowhere=self.family == "sleep" and at == ("source",))
        for device in self.dtypes:
            if device not in self.batch:
                raise wrong(f"says nothing of {device}, which dtypes names; add it", "batch")
        self._check_family()
        if fault := param_fault(self, self.defaults):
            raise wrong(fault.text, "defaults", fault.name)
        for name, preset in self.presets.items():
            if fault := param_fault(self, merged(self.defaults, preset)):
                raise wrong(fault.text, "presets", name, fault.name)
        negatives = [("defaults", self.defaults.negative_prompt)]
        negatives += [(f"presets.{name}", preset.negative_prompt or "") for name, preset in self.presets.items()]
        for place, text in negatives:
            try:
                negative_of(self, text)
            except ManifestError as exc:
                said = exc.message.removeprefix("negative_prompt ")
                raise wrong(said, *place.split(".", 1), "negative_prompt") from exc
        return self

    def accelerated_on(self, device: Literal["cuda", "cpu"]) -> Acceleration:
        """How the denoiser is accelerated on one kind of device."""
        return self.acceleration.get(device, PLAIN)

    def _sources(self) -> Iterator[tuple[tuple[str | int, ...], Source]]:
        yield ("source",), self.source
        for name, source in (("denoiser", self.denoiser), ("decoder", self.decoder)):
            if source is not None:
                yield (name,), source
        for number, adapter in enumerate(self.adapters):
            yield ("adapters", number), adapter

    def _check_family(self) -> None:
        """Refuse what the family does not know, which would be passed over without a word."""
        takes = FAMILIES[self.family]
        for name, given, taken in (
            ("denoiser", self.denoiser, takes.denoiser),
            ("decoder", self.decoder, takes.decoder),
            ("adapters", self.adapters, takes.adapters),
            ("scheduler", self.scheduler, takes.scheduler),
            ("code", self.code, takes.code),
        ):
            if given and not taken:
                raise wrong(f"the family {self.family} takes none; leave it out", name)
        if self.denoiser is not None:
            if self.denoiser.format not in takes.denoiser:
                known = ", ".join(takes.denoiser)
                raise wrong(f"the family {self.family} reads {known}; take such a file", "denoiser", "format")
            if "denoiser" in self.quantise:
                said = (
                    "quantised already, in its GGUF file"
                    if self.denoiser.format == "gguf"
                    else "read from its own file as it is"
                )
                raise wrong(f"the denoiser is {said}; leave it out", "quantise", "denoiser")
        for device, how in self.acceleration.items():
            for name in Acceleration.model_fields:
                if getattr(how, name) != getattr(PLAIN, name) and name not in takes.acceleration:
                    raise wrong(
                        f"the family {self.family} has no such thing; leave it out", "acceleration", device, name
                    )
            if how.first_block_cache is not None and self.batch.get(device, 1) > 1:
                said = "leaves out blocks by what all pictures of a batch need together; draw one at a time"
                raise wrong(f"{said} (batch: {{{device}: 1}})", "acceleration", device, "first_block_cache")
        for part in self.quantise:
            if part not in takes.quantise:
                raise wrong(f"the family {self.family} does not quantise it; leave it out", "quantise", part)
        names = [adapter.name for adapter in self.adapters]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise wrong(f"two adapters are called {name}; rename one", "adapters", number, "name")
        for name, value in self.options.items():
            if fault := option_fault(self.family, name, value):
                raise wrong(fault, "options", name)


class ParamFault(Card):
    """A parameter that the model cannot take, and what to write instead."""

    name: str
    text: str


def find_card(name: str, settings: Settings) -> ModelCard:
    """Return the card of that name. Raises UnknownModelError, or ModelCardError when the card itself is wrong."""
    files = _card_files(settings)
    if name in files:
        return load_card(files[name])
    near = did_you_mean(name, list(files)) or f"; known here: {', '.join(files) or 'none'}"
    raise UnknownModelError(f"no model card is called {shown(name)}{near}{HOW_TO_ADD}")


def look_through(settings: Settings) -> dict[str, ModelCard | ModelCardError]:
    """Return every card by name, and in place of one that is wrong what is wrong with it."""
    found: dict[str, ModelCard | ModelCardError] = {}
    for name, file in _card_files(settings).items():
        try:
            found[name] = load_card(file)
        except ModelCardError as exc:
            found[name] = exc
    return found


def load_card(path: Path) -> ModelCard:
    """Read one card file; a relative `path` of a source comes out absolute. Raises ModelCardError with file and line."""
    document = read_yaml(path, ModelCardError, what="model card", pipes=False)
    lists = {
        "": tuple(ModelCard.model_fields),
        "source": tuple(Source.model_fields),
        "limits": tuple(SizeLimits.model_fields),
        "defaults": tuple(RenderParams.model_fields),
        "denoiser": tuple(Denoiser.model_fields),
        "decoder": tuple(Source.model_fields),
        "scheduler": tuple(Scheduler.model_fields),
        "adapters": tuple(Adapter.model_fields),
    }
    lists |= {f"acceleration.{kind}": tuple(Acceleration.model_fields) for kind in ("cuda", "cpu")}
    presets = document.data.get("presets")
    for preset in presets if isinstance(presets, dict) else ():
        lists[f"presets.{preset}"] = tuple(Preset.model_fields)
    card = validate(document, ModelCard, ModelCardError, field_lists=lists)
    if card.name != path.stem:
        raise ModelCardError(
            f"{document.where(('name',))}: the card is called {shown(card.name)} and its file {path.name}; "
            f"call the file {card.name}.yaml"
        )
    folder = path.absolute().parent

    def absolute(source: AnySource, *at: str | int) -> AnySource:
        try:
            return _absolute(source, folder)
        except (RuntimeError, OSError) as exc:
            said = "has no home or goes in a circle" if isinstance(exc, RuntimeError) else exc.strerror or str(exc)
            place = ".".join(map(str, (*at, "path")))
            raise ModelCardError(
                f"{document.where((*at, 'path'))}: {place}: {shown(source.path)} names no folder ({said}); write the path out"
            ) from exc

    found: dict[str, object] = {"source": absolute(card.source, "source")}
    found |= {name: absolute(part, name) for name in ("denoiser", "decoder") if (part := getattr(card, name))}
    found["adapters"] = tuple(absolute(adapter, "adapters", at) for at, adapter in enumerate(card.adapters))
    return card.model_copy(update=found)


def _absolute(source: AnySource, folder: Path) -> AnySource:
    if source.path is None or source.path.startswith(PACKAGE):
        return source
    return source.model_copy(update={"path": str((folder / Path(source.path).expanduser()).resolve())})


def param_fault(card: ModelCard, params: RenderParams) -> ParamFault | None:
    """Return what the model cannot take in `params`, with the nearest it can, or None."""
    if params.num_inference_steps > card.max_steps:
        return ParamFault(
            name="num_inference_steps",
            text=f"{params.num_inference_steps} is more than {card.name}'s {card.max_steps}; lower it",
        )
    return size_fault(card, params.width, params.height)


def size_fault(card: ModelCard, width: int, height: int) -> ParamFault | None:
    """Return why the model cannot draw a size, with the nearest size it can, or None."""
    limits, size = card.limits, f"{width}x{height}"
    fault = None
    if limits.sizes:
        if (width, height) not in limits.sizes:
            allowed = ", ".join(f"{w}x{h}" for w, h in limits.sizes)
            fault = "width", f"{size} is not a size of {card.name}, which draws {allowed}"
    else:
        for name, value in (("width", width), ("height", height)):
            if value % limits.multiple_of:
                fault = name, f"{value} in {size} is not a multiple of {limits.multiple_of}, as {card.name} needs"
            elif value < limits.min_px:
                fault = name, f"{value} in {size} is below {card.name}'s shortest side, {limits.min_px}"
            elif value > limits.max_px:
                fault = name, f"{value} in {size} is above {card.name}'s longest side, {limits.max_px}"
            if fault:
                break
        if not fault and width * height > limits.max_pixels:
            fault = "width", f"{size} has {width * height} pixels, more than {card.name}'s {limits.max_pixels}"
    if fault is None:
        return None
    near = nearest_size(limits, width, height)
    return ParamFault(name=fault[0], text=f"{fault[1]}; nearest is {near[0]}x{near[1]}")


def nearest_size(limits: SizeLimits, width: int, height: int) -> tuple[int, int]:
    """Return an allowed size near the one asked for, its shape kept where only the area is too large."""
    if limits.sizes:
        return min(limits.sizes, key=lambda size: (abs(size[0] - width) + abs(size[1] - height), size))
    step = limits.multiple_of
    low, high = -(-limits.min_px // step) * step, limits.max_px // step * step
    shrink = min(1.0, math.sqrt(limits.max_pixels / (width * height)))
    sides = [min(max(round(side * shrink / step) * step, low), high) for side in (width, height)]
    while sides[0] * sides[1] > limits.max_pixels and max(sides) > low:
        sides[sides.index(max(sides))] -= step
    return sides[0], sides[1]


def merged(params: RenderParams, *overrides: ParamOverrides) -> RenderParams:
    """Return `params` with what the overrides set, a later one over an earlier."""
    names = type(params).model_fields
    given = {name: value for layer in overrides for name, value in layer if value is not None and name in names}
    return params.model_copy(update=given) if given else params


def negative_of(card: ModelCard, text: str) -> str:
    """Return the negative prompt that a text stands for: `@NAME` is the card's of that name, `@@` begins with one @.

    Raises ManifestError, which says no place, where the card has none of that name.
    """
    if not text.startswith("@"):
        return text
    name = text[1:]
    if name.startswith("@"):
        return name
    if name in card.negative_prompts:
        return card.negative_prompts[name]
    known = ", ".join(f"@{known}" for known in card.negative_prompts) or "none"
    near = did_you_mean(name, list(card.negative_prompts)).replace("did you mean ", "did you mean @")
    raise ManifestError(
        f"negative_prompt {shown(text)}: {card.name} has no negative prompt of that name{near or f'; it has {known}'} "
        "(@@ begins a text with an @)"
    )


def resolved(card: ModelCard, overrides: AnyOverrides) -> AnyOverrides:
    """Return parameters with the negative prompt itself where they name one of the card's. Raises ManifestError."""
    text = overrides.negative_prompt
    if text is None or not text.startswith("@"):
        return overrides
    return overrides.model_copy(update={"negative_prompt": negative_of(card, text)})


def _folders(settings: Settings) -> list[Path]:
    here = Path(__file__).parent
    packaged = here / "cards"
    own = [settings.models] if settings.models else []
    return [*own, packaged if packaged.is_dir() else here.parent / "manifests" / "models"]


def _card_files(settings: Settings) -> dict[str, Path]:
    if settings.models and not settings.models.is_dir():
        raise ModelCardError(f"FARM_MODELS: {settings.models} is not a folder; make it, or unset it")
    files: dict[str, Path] = {}
    for folder in reversed(_folders(settings)):
        files.update({file.stem: file for file in folder.glob("*.yaml")})
    return dict(sorted(files.items()))
