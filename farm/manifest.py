"""A manifest: the YAML a person writes to say what to render.

Owns its schema and how a file becomes a record. Knows what stands in the file, and in those that it includes, and nothing
else: whether the model exists, a size fits it, or a prompt file can be read is found out where those are opened.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from farm.errors import ManifestError
from farm.modelcard import ParamOverrides
from farm.moment import moment
from farm.scenefile import INCLUDED, Reader, ReadUrl, has_scenes, included, with_texts
from farm.yamlfile import Document, Loc, did_you_mean, read_yaml, shown, validate

MAX_SEED = 2**32 - 1
MAX_LIST = 100_000
MAX_PILOT = 1_000_000
NAME_RULE = "1 to 63 of a-z, 0-9, - and _, beginning with a letter or digit"

ParamName = Literal["negative_prompt", "width", "height", "num_inference_steps", "guidance_scale"]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Root of a manifest's parts: frozen, a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PromptFile(Section):
    """Prompts from .txt, .jsonl, .csv or .parquet files."""

    file: Text = Field(description="path, glob or s3:// URL; relative to the manifest's folder")
    column: Text | None = Field(default=None, description="column of the prompts; `prompt` where empty; none in .txt")
    key: Text | None = Field(
        default=None, description="column that names a row for good: seeds and file names follow it"
    )
    per_row: dict[ParamName, Text] = Field(default={}, description="parameter -> column that overrides it row by row")
    carry: tuple[Text, ...] = Field(default=(), description="columns copied into the receipts")
    encoding: str = Field(default="utf-8", description="of text files")

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=value)  # codecs.lookup() knows hex and its like, which give no text
        except (LookupError, ValueError) as exc:
            raise _fault(f"no such encoding of text, got {shown(value)}; leave it out for UTF-8") from exc
        return value

    @field_validator("carry")
    @classmethod
    def _carried_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _refuse_doubles(value)
        return value


class VaryFile(Section):
    """A variable's values from a file."""

    file: Text = Field(description=".txt (a value a line), .csv or .jsonl; relative to the manifest's folder")
    column: Text | None = Field(default=None, description="column of the values; the variable's name where empty")


def _vary_kind(value: Any) -> str:
    return "<file>" if isinstance(value, dict | VaryFile) else "<list>"


VaryValues = Annotated[
    Annotated[tuple[StrictStr | StrictInt | StrictFloat, ...], Field(min_length=1, max_length=MAX_LIST), Tag("<list>")]
    | Annotated[VaryFile, Tag("<file>")],
    Discriminator(_vary_kind),
]


class PromptTemplate(Section):
    """Prompts from a template: `{name}` takes each of its values, `{a|b}` is drawn, `{{` and `}}` are braces."""

    template: Text
    vary: dict[str, VaryValues] = Field(default={}, description="variable -> its values, or a file of them")
    combine: Literal["product", "zip"] = Field(default="product", description="every combination, or side by side")
    draw: int | None = Field(default=None, gt=0, le=2**53, description="draw so many prompts at random")
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="decides draws; drawn once where empty")

    @field_validator("template")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise _fault("is blank; write a text with {variables}")
        return value

    @property
    def drawn_once(self) -> bool:
        """Whether rows depend on a root that the manifest leaves to chance."""
        return self.seed is None and (self.draw is not None or "|" in self.template)


def _prompts_kind(value: Any) -> str:
    if isinstance(value, PromptTemplate) or (isinstance(value, dict) and {"template", "vary", "draw"} & value.keys()):
        return "<template>"
    return "<file>" if isinstance(value, dict | PromptFile) else "<list>"


PromptTexts = tuple[str, ...]
Prompts = Annotated[
    Annotated[PromptTexts, Field(min_length=1, max_length=MAX_LIST), Tag("<list>")]
    | Annotated[PromptFile, Tag("<file>")]
    | Annotated[PromptTemplate, Tag("<template>")],
    Discriminator(_prompts_kind),
]


class SeedCount(Section):
    """So many seeds for every prompt, and where they come from."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    count: int = Field(default=1, gt=0, le=1_000_000, description="images per prompt and sweep point")
    rule: Literal["key", "shared", "slot", "random"] | None = Field(
        default=None,
        alias="from",
        description=(
            "key: follow the row's key; shared: root, root + 1, ... for every prompt; slot: follow the row's number; "
            "random: a root drawn once, recorded. Where empty: key for keyed prompts, else slot"
        ),
    )
    root: int | None = Field(default=None, ge=0, le=MAX_SEED, description="another root, other seeds; 0 where empty")

    @model_validator(mode="after")
    def _within_range(self) -> "SeedCount":
        if self.rule == "random" and self.root is not None:
            raise _fault("from: random draws its own root; leave root out, or write from: slot", "root")
        if self.rule == "shared" and (self.root or 0) + self.count - 1 > MAX_SEED:
            raise _fault(f"root + count - 1 must be at most {MAX_SEED}; lower root", "root")
        return self


def _seeds_kind(value: Any) -> str:
    return "<count>" if isinstance(value, dict | SeedCount) else "<list>"


Seed = Annotated[int, Field(ge=-1, le=MAX_SEED)]
Seeds = Annotated[
    Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MAX_LIST), Tag("<list>")]
    | Annotated[SeedCount, Tag("<count>")],
    Discriminator(_seeds_kind),
]


class Output(Section):
    """What picture files the job leaves."""

    format: Literal["png", "webp", "jpeg"] = "png"
    quality: int | None = Field(default=None, ge=1, le=100, description="of webp and jpeg; 95 where empty")
    thumbnails: bool = Field(default=True, description="small WebP copies for pages and the contact sheet")

    @model_validator(mode="after")
    def _quality_has_effect(self) -> "Output":
        if self.format == "png" and self.quality is not None:
            raise _fault("has no effect on png, which is lossless; leave it out, or use format: webp", "quality")
        return self


class Budget(Section):
    """What a job may use up before it stops by itself."""

    gpu_hours: float | None = Field(default=None, gt=0, description="hours of GPUs at work on it, all together")
    images: int | None = Field(default=None, gt=0, description="pictures rendered, those rendered again too")

    @model_validator(mode="after")
    def _limits_something(self) -> "Budget":
        if self.gpu_hours is None and self.images is None:
            raise _fault("limits nothing; write gpu_hours, images or both, or leave budget out")
        return self


class Manifest(Section):
    """What to render. Prompts x sweep points x seeds are the images."""

    name: str = Field(description=f"the job's name: {NAME_RULE}")
    model: Text = Field(description="a model card's name")
    prompts: Prompts = Field(description="a list of texts and scenes, {file, ...} or {template, ...}")
    seeds: Seeds = Field(default=SeedCount(), description="{count, from} or a list; -1 in it is drawn once")
    preset: Text | None = Field(default=None, description="one of the card's")
    params: ParamOverrides = Field(default=ParamOverrides(), description="over the preset")
    sweep: dict[str, tuple[StrictStr | StrictInt | StrictFloat, ...]] = Field(
        default={}, description="parameter -> list of values; every combination is rendered"
    )
    output: Output = Output()
    pilot: int | None = Field(
        default=None,
        gt=0,
        le=MAX_PILOT,
        description="render so many images, spread over the job, then wait for approval",
    )
    priority: int = Field(default=50, ge=0, le=100, description="higher goes first")
    finish_by: str | None = Field(default=None, description="ISO 8601 with an offset; the job stops then")
    budget: Budget | None = Field(default=None, description="{gpu_hours, images}; the job stops when it is used up")

    @field_validator("finish_by", mode="before")
    @classmethod
    def _moment_with_offset(cls, value: Any) -> Any:
        if value is None:
            return value
        try:
            return moment(value if isinstance(value, str) else shown(value)).isoformat()
        except ValueError as exc:
            raise _fault(str(exc)) from exc

    @field_validator("name")
    @classmethod
    def _name_rule(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", value):
            tidy = re.sub(r"[^a-z0-9_-]+", "-", value.lower()).strip("-_")[:63]
            hint = f"; {tidy} would do" if tidy else "; choose another"
            raise _fault(f"must be {NAME_RULE}, got {shown(value)}{hint}")
        return value

    @field_validator("prompts")
    @classmethod
    def _no_empty_prompt(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            for at, prompt in enumerate(value):
                if not prompt.strip():
                    raise _fault(f"prompt {at + 1} is empty; write one, or take the line out", at)
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            _refuse_doubles(value, may_repeat=-1)
        return value

    @field_validator("sweep")
    @classmethod
    def _sweep_values(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for name, values in value.items():
            _check_sweep(name, values)
        return value

    @model_validator(mode="after")
    def _set_once(self) -> "Manifest":
        for name in self.sweep:
            if getattr(self.params, name) is not None:
                raise _fault(f"{name} stands in params too; keep it in one of them", "sweep", name)
            if isinstance(self.prompts, PromptFile) and name in self.prompts.per_row:
                raise _fault(f"{name} stands in prompts.per_row too; keep it in one of them", "sweep", name)
        if isinstance(self.seeds, SeedCount) and self.seeds.rule == "key" and not self.keyed:
            raise _fault(
                "from: key needs rows with keys; name their column in prompts.key, or write from: slot", "seeds", "from"
            )
        return self

    @property
    def keyed(self) -> bool:
        """Whether the prompts' rows have keys."""
        return isinstance(self.prompts, PromptFile) and self.prompts.key is not None


@dataclass(frozen=True, slots=True)
class LoadedManifest:
    """A manifest and the file it came from, so that what is found out later can still name a line."""

    manifest: Manifest
    document: Document


def load_manifest(path: str | Path, *, read_url: ReadUrl | None = None) -> LoadedManifest:
    """Read and validate a manifest file; paths in it come out absolute. Raises ManifestError with file and line.

    `read_url`: reads the s3:// URLs that it includes; without, such are refused.
    """
    return manifest_in(read_yaml(path, ManifestError, what="manifest"), Path(path).absolute().parent, read_url=read_url)


def manifest_in(document: Document, folder: Path, *, read_url: ReadUrl | None = None) -> LoadedManifest:
    """Validate a document whose files are relative to a folder, and come out absolute. Raises ManifestError."""

    def read(file: str, loc: Loc) -> Document:
        if file.startswith("s3://"):
            return included(file, document.where(loc), read_url)
        if "://" in file:
            raise ManifestError(
                f"{document.where(loc)}: include: is read from files and s3:// alone, got {shown(file)}; download it"
            )
        return read_yaml(_path_in(folder, file, document, loc), ManifestError, what=INCLUDED, pipes=False)

    loaded = manifest_of(document, read_included=read)
    for loc, file in named_files(loaded.manifest):
        if "://" not in file:
            _path_in(folder, file, document, loc)
    return LoadedManifest(manifest=_with_absolute_files(loaded.manifest, folder), document=loaded.document)


def manifest_of(document: Document, *, read_included: Reader | None = None) -> LoadedManifest:
    """Validate a document; files of prompts and values that it names stay as they stand there. Raises ManifestError.

    `read_included`: reads what it includes; without, an include is refused.
    """
    if has_scenes(document):
        document = with_texts(document, read_included or _refuse_included)
    manifest = validate(document, Manifest, ManifestError, other_names=OTHER_NAMES, field_lists=_FIELD_LISTS)
    return LoadedManifest(manifest=manifest, document=document)


def named_files(manifest: Manifest) -> list[tuple[Loc, str]]:
    """Return every file, glob or URL that the manifest reads, and where it stands in it."""
    prompts = manifest.prompts
    if isinstance(prompts, PromptFile):
        return [(("prompts", "file"), prompts.file)]
    if isinstance(prompts, PromptTemplate):
        named = [(name, values) for name, values in prompts.vary.items() if isinstance(values, VaryFile)]
        return [(("prompts", "vary", name, "file"), values.file) for name, values in named]
    return []


OTHER_NAMES = {
    **dict.fromkeys(
        ("steps", "num_steps", "sampling_steps", "inference_steps", "n_steps", "iterations"),
        "it is called num_inference_steps, in params",
    ),
    **dict.fromkeys(
        ("cfg", "cfg_scale", "guidance", "scale", "true_cfg_scale"), "it is called guidance_scale, in params"
    ),
    **dict.fromkeys(
        ("negative", "neg", "neg_prompt", "negative_prompts", "uc"), "it is called negative_prompt, in params"
    ),
    **dict.fromkeys(
        ("size", "resolution", "dimensions", "image_size", "aspect_ratio"), "write width and height, in params"
    ),
    "w": "it is called width, in params",
    "h": "it is called height, in params",
    **dict.fromkeys(
        ("n", "count", "num_images", "num_images_per_prompt", "images", "samples", "n_iter", "repeat"),
        "write seeds: {count: N}",
    ),
    **dict.fromkeys(("seed", "random_seed", "noise_seed"), "write seeds: [N], a list, at the top"),
    **dict.fromkeys(("sampler", "sampler_name", "scheduler"), "the model's card decides it; leave it out"),
    **dict.fromkeys(("batch", "batch_size"), "the model's card decides it; leave it out"),
    **dict.fromkeys(("model_id", "model_name", "checkpoint", "ckpt"), "it is called model, at the top"),
    **dict.fromkeys(("prompt", "text", "texts", "captions"), "it is called prompts, at the top"),
    **dict.fromkeys(("path", "files", "source"), "it is called file, in prompts"),
    **dict.fromkeys(("matrix", "grid"), "it is called sweep, at the top"),
    **dict.fromkeys(("ext", "image_format"), "it is called format, in output"),
    **dict.fromkeys(("id", "id_column"), "it is called key, in prompts"),
    **dict.fromkeys(("caption_column", "text_column"), "it is called column, in prompts"),
    **dict.fromkeys(("variables", "vars", "wildcards"), "it is called vary, in prompts"),
    **dict.fromkeys(("job", "title", "id_prefix"), "it is called name, at the top"),
    **dict.fromkeys(
        ("deadline", "due", "due_by", "finish", "finish_at", "end_by", "until"), "it is called finish_by, at the top"
    ),
    **dict.fromkeys(
        ("gpu_hours", "max_gpu_hours", "max_hours", "max_images", "limit", "limits", "quota", "cost"),
        "write budget: {gpu_hours: N, images: N}, or one of them",
    ),
    **dict.fromkeys(("preview", "trial", "dry_run", "test_images", "pilots"), "it is called pilot, at the top"),
    **dict.fromkeys(("prio", "urgency"), "it is called priority, at the top"),
    **dict.fromkeys(("owner", "user", "submitted_by"), "the owner is a setting: FARM_OWNER"),
    **dict.fromkeys(
        ("characters", "general_tags", "scene", "scenes"), "a scene is an item of a list: prompts: [{characters: ...}]"
    ),
    **dict.fromkeys(("output_dir", "outdir", "out"), "the store is a setting: FARM_STORE or --store"),
}

_FIELD_LISTS: dict[str, tuple[str, ...]] = {
    "": (*Manifest.model_fields, "include"),
    "prompts": (*PromptFile.model_fields, *PromptTemplate.model_fields),
    "prompts.per_row": get_args(ParamName),
    "seeds": ("count", "from", "root"),
    "params": get_args(ParamName),
    "sweep": get_args(ParamName),
    "output": tuple(Output.model_fields),
    "budget": tuple(Budget.model_fields),
}

_PARAM_TYPES: dict[str, TypeAdapter[Any]] = {
    "negative_prompt": TypeAdapter(str),
    "width": TypeAdapter(Annotated[int, Field(gt=0)]),
    "height": TypeAdapter(Annotated[int, Field(gt=0)]),
    "num_inference_steps": TypeAdapter(Annotated[int, Field(gt=0)]),
    "guidance_scale": TypeAdapter(Annotated[float, Field(ge=0, allow_inf_nan=False)]),
}


def _check_sweep(name: str, values: tuple[Any, ...]) -> None:
    if name not in _PARAM_TYPES:
        known = get_args(ParamName)
        advice = OTHER_NAMES.get(name.lower())
        hint = f"; {advice.removesuffix(', in params')}" if advice else did_you_mean(name, known)
        raise _fault(f"unknown parameter `{name}`{hint or '; known: ' + ', '.join(known)}", name)
    if not values:
        raise _fault(f"{name} is an empty list; give it values, or take it out", name)
    for at, value in enumerate(values):
        try:
            _PARAM_TYPES[name].validate_python(value, strict=True)
        except ValidationError as exc:
            text = exc.errors()[0]["msg"].removeprefix("Input ").replace("valid integer", "whole number")
            raise _fault(f"{text}, got {shown(value)}; change it", name, at) from exc
    _refuse_doubles(values, name)


def _refuse_doubles(values: tuple[Any, ...], *at: str | int, may_repeat: Any = None) -> None:
    seen: set[Any] = set()
    for place, value in enumerate(values):
        if value in seen and value != may_repeat:
            raise _fault(f"{shown(value)} stands twice in the list; keep it once", *at, place)
        seen.add(value)


def _fault(text: str, *at: str | int) -> PydanticCustomError:
    """Return an error for pydantic that lies at a place below the one being validated."""
    return PydanticCustomError("farm", "{text}", {"text": text, "at": at})


def _refuse_included(file: str, _loc: Loc) -> Document:
    raise ManifestError(f"include: files cannot be read from here, got {shown(file)}; write the characters out")


def _path_in(folder: Path, file: str, document: Document, loc: Loc) -> Path:
    """Return the path that a manifest's key names. Raises ManifestError where it can be none."""
    key = f"{document.where(loc)}: {'.'.join(map(str, loc))}"
    if "\0" in file:
        raise ManifestError(f"{key}: {shown(file)} has a NUL, which no path has; take it out")
    try:
        return folder / Path(file).expanduser()
    except RuntimeError as exc:
        raise ManifestError(f"{key}: no home is known for the user of {shown(file)}; write the path out") from exc


def _with_absolute_files(manifest: Manifest, folder: Path) -> Manifest:
    def absolute(file: str) -> str:
        return file if "://" in file else str(folder / Path(file).expanduser())

    prompts = manifest.prompts
    if isinstance(prompts, PromptFile):
        prompts = prompts.model_copy(update={"file": absolute(prompts.file)})
    elif isinstance(prompts, PromptTemplate):
        vary = {
            name: values.model_copy(update={"file": absolute(values.file)}) if isinstance(values, VaryFile) else values
            for name, values in prompts.vary.items()
        }
        prompts = prompts.model_copy(update={"vary": vary})
    return manifest.model_copy(update={"prompts": prompts})
