"""Model cards: what a model is, where its weights lie, what it may be asked for, and its presets.

A card is YAML in `manifests/models/` (in an installed farm: `farm/cards/`) or in a folder of the user's own
(`FARM_MODELS`), which is searched first; the file's name is the card's name. Knows nothing of torch: whether a card's
weights load is found out where they are loaded.
"""

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from farm.errors import ModelCardError, UnknownModelError
from farm.hub import commit_of
from farm.settings import Settings
from farm.yamlfile import did_you_mean, read_yaml, shown, validate

_PACKAGE = "package:"
_WHOLE_FILE_BYTES = 64 * 2**20

HOW_TO_ADD = " (FARM_MODELS names a folder of more)"
"""How a message ends for who may set this machine's settings; the endpoint leaves it out."""


class Card(BaseModel):
    """Root of the records below: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class Preset(ParamOverrides):
    """Parameters under a name."""

    warning: str | None = Field(default=None, description="said to whoever uses it: where it contradicts the model's authors")


class Source(Card):
    """Where the weights are, in diffusers' folder layout: a folder, a hub id with a pinned revision, or a prefix in a bucket."""

    path: str | None = Field(
        default=None,
        description="folder; relative to the card's file, or package:NAME/FOLDER inside an installed package",
    )
    hub: str | None = Field(default=None, description="hub id")
    s3: str | None = Field(default=None, description="s3://bucket/prefix, copied to each node once")
    revision: str | None = Field(
        default=None, description="commit, tag or branch of the hub id; in a plan what `pinned` found"
    )

    @property
    def given(self) -> str | None:
        """Whichever of the places is written."""
        return self.path or self.hub or self.s3


class WeightsFile(Source):
    """One file of weights that lies elsewhere than the model: a quantised denoiser, an adapter."""

    file: str = Field(min_length=1, description="name of the file below its folder, hub id or prefix")


class Denoiser(WeightsFile):
    """A denoiser in one file, in place of the source's own."""

    format: Literal["gguf", "safetensors"]


class Adapter(WeightsFile):
    """A LoRA adapter, active in every picture of this card."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    weight: float = 1.0


class Scheduler(Card):
    """How a denoising step is taken: a scheduler of diffusers, set up as the source's own but for `options`."""

    name: Literal["flow-euler", "flow-heun", "flow-dpm++", "flow-unipc"]
    options: dict[str, bool | int | float | str | None] = {}


class SizeLimits(Card):
    """Which pictures the model can draw. `sizes`, where given, lists the only (width, height) pairs allowed."""

    multiple_of: int = Field(default=16, gt=0, description="pixels")
    min_px: int = Field(default=64, gt=0, description="shortest side")
    max_px: int = Field(default=2048, gt=0, description="longest side")
    max_pixels: int = Field(default=2048 * 2048, gt=0, description="width x height")
    sizes: tuple[tuple[int, int], ...] = ()


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
    options: dict[str, bool | int | float | str] = Field(
        default={}, description="what only this family has; each family names its own"
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
    presets: dict[str, Preset] = {}
    negative_prompts: dict[str, str] = Field(
        default={}, description="negative prompts by name; written as @NAME where one is asked for"
    )
    seconds_per_image: dict[str, float] = Field(
        default={}, description="estimate at the defaults by device kind, where somebody measured one"
    )

    @field_validator("dtypes", "batch")
    @classmethod
    def _one_device_at_least(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise _fault("names no device; write one for cpu or cuda")
        for device, entry in value.items():
            if entry == () or (isinstance(entry, int) and entry < 1):
                raise _fault(f"must be at least one, got {shown(entry)}; change it", device)
        return value

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        for name in ("source", "denoiser", "decoder"):
            place: Source | None = getattr(self, name)
            if place is None or (self.family == "sleep" and name == "source"):
                continue
            if sum(given is not None for given in (place.path, place.hub, place.s3)) != 1:
                raise _fault("needs one of path, hub and s3; name where the weights are", name)
        for device in self.dtypes:
            if device not in self.batch:
                raise _fault(f"says nothing of {device}, which dtypes names; add it", "batch")
        if fault := param_fault(self, self.defaults):
            raise _fault(fault.text, "defaults", fault.name)
        for name, preset in self.presets.items():
            if fault := param_fault(self, merged(self.defaults, preset)):
                raise _fault(fault.text, "presets", name, fault.name)
        return self


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


def list_cards(settings: Settings) -> list[ModelCard]:
    """Return all cards by name. Raises ModelCardError when one is wrong."""
    return [load_card(file) for file in _card_files(settings).values()]


def load_card(path: Path) -> ModelCard:
    """Read one card file; a relative `source.path` comes out absolute. Raises ModelCardError with file and line."""
    document = read_yaml(path, ModelCardError, what="model card")
    lists = {
        "": tuple(ModelCard.model_fields),
        "source": tuple(Source.model_fields),
        "limits": tuple(SizeLimits.model_fields),
        "defaults": tuple(RenderParams.model_fields),
        "denoiser": tuple(Denoiser.model_fields),
        "decoder": tuple(Source.model_fields),
        "scheduler": tuple(Scheduler.model_fields),
    }
    presets = document.data.get("presets")
    for preset in presets if isinstance(presets, dict) else ():
        lists[f"presets.{preset}"] = tuple(Preset.model_fields)
    card = validate(document, ModelCard, ModelCardError, field_lists=lists)
    if card.name != path.stem:
        raise ModelCardError(
            f"{document.where(('name',))}: the card is called {shown(card.name)} and its file {path.name}; "
            f"call the file {card.name}.yaml"
        )
    where = card.source.path
    if where is None or where.startswith(_PACKAGE):
        return card
    absolute = str((path.absolute().parent / Path(where).expanduser()).resolve())
    return card.model_copy(update={"source": card.source.model_copy(update={"path": absolute})})


def source_folder(source: Source) -> Path | None:
    """Return the folder of the weights on this machine, None for a hub id. Raises ModelCardError if it is not there."""
    if source.path is None:
        return None
    folder = Path(source.path)
    if source.path.startswith(_PACKAGE):
        package, _, inside = source.path.removeprefix(_PACKAGE).partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelCardError(
                f"source.path {source.path}: there is no package {package}; install it, or mend the card"
            )
        folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise ModelCardError(
            f"source.path {source.path}: {folder} is not a folder; put the weights there, or mend the card"
        )
    return folder


def pinned(card: ModelCard) -> ModelCard:
    """Return the card with the `source.revision` that its weights have now: a hub id's commit, or a folder's digest.

    The digest is over names, sizes and contents of what lies in the folder, but for dot files and dot folders; of a file
    above 64 MiB only the first and the last MiB are read, so that planning is quick. Raises ModelCardError.
    """
    source = card.source
    if source.hub is not None:
        commit = commit_of(card.name, source.hub, source.revision)
        return card.model_copy(update={"source": source.model_copy(update={"revision": commit})})
    folder = source_folder(source)
    if folder is None:
        return card
    digest = hashlib.sha256()
    try:
        for file in _visible_files(folder):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
            with file.open("rb") as data:
                if size <= _WHOLE_FILE_BYTES:
                    digest.update(data.read())
                else:
                    digest.update(data.read(2**20))
                    data.seek(-(2**20), 2)
                    digest.update(data.read())
    except OSError as exc:
        raise ModelCardError(
            f"{exc.filename}: cannot be read: {exc.strerror}; check the weights of {card.name}"
        ) from exc
    revision = f"sha256:{digest.hexdigest()}"
    return card.model_copy(update={"source": source.model_copy(update={"revision": revision})})


def _visible_files(folder: Path) -> list[Path]:
    """Files below a folder, sorted; not what editors, git and the hub's client keep under names with a dot."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


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


def _fault(text: str, *at: str) -> PydanticCustomError:
    return PydanticCustomError("farm", "{text}", {"text": text, "at": at})


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
