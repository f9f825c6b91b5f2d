"""What a model card is made of: where weights lie, what is laid over them, how a step is taken, which pictures can be drawn.

Records, each sound by itself; what hangs together between them is `farm.modelcard`'s.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from farm.yamlfile import shown

PACKAGE = "package:"
"""How a path begins that lies inside an installed package."""
_BUCKET_URL = re.compile(r"s3://[^/]+(/.*)?")
_MODULE_FILE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*/)*[A-Za-z_][A-Za-z0-9_]*\.py")
"""Of ASCII alone: Python takes other letters for one another in the names of modules."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Card(BaseModel):
    """Root of the records below: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Card):
    """Where the weights are, in diffusers' folder layout: a folder, a hub id with a pinned revision, or a prefix in a bucket."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="folder; relative to the card's file, or package:NAME/FOLDER inside an installed package",
    )
    hub: str | None = Field(default=None, min_length=1, description="hub id")
    s3: str | None = Field(default=None, min_length=1, description="s3://bucket/prefix, copied to each node once")
    revision: str | None = Field(
        default=None, description="commit, tag or branch of the hub id; in a plan what `pinned` found"
    )

    @property
    def given(self) -> str | None:
        """Whichever of the places is written."""
        return self.path or self.hub or self.s3

    @property
    def places(self) -> tuple[str, ...]:
        """By which keys places are given; a sound source has one."""
        return tuple(name for name in ("path", "hub", "s3") if getattr(self, name) is not None)


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


Attention = Literal[
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
]
"""Diffusers' names of attention kernels: torch's own, and those of packages that are installed.

Left out: what would be downloaded to be run, and what writes out every token's weight for every other (flex, _native_math), which
at 1024x1024 takes several GiB.
"""


class Acceleration(Card):
    """What makes a denoiser quicker, and changes its rounding or more: so it is the card's word, for one kind of device, and part
    of a plan. Off where nothing is written, since what it gains depends on the GPU: `farm bench` measures it."""

    compile: bool = Field(default=False, description="its repeated blocks are compiled by torch as the model is loaded")
    attention: Attention = Field(default="native", description="which attention kernel; native: torch chooses")
    first_block_cache: float | None = Field(
        default=None,
        gt=0,
        description="a step whose first block changes by less than this share of an earlier one's takes the others from it; "
        "for many steps: at 8 it does not pay",
    )

    def __str__(self) -> str:
        given = self.model_dump(exclude_defaults=True)
        return ", ".join(name if value is True else f"{name} {value}" for name, value in given.items()) or "none"


PLAIN = Acceleration()


class SizeLimits(Card):
    """Which pictures the model can draw. `sizes`, where given, lists the only (width, height) pairs allowed."""

    multiple_of: int = Field(default=16, gt=0, description="pixels")
    min_px: int = Field(default=64, gt=0, description="shortest side")
    max_px: int = Field(default=2048, gt=0, description="longest side")
    max_pixels: int = Field(default=2048 * 2048, gt=0, description="width x height")
    sizes: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]], ...] = ()

    @model_validator(mode="after")
    def _leaves_a_size(self) -> Self:
        if self.min_px > self.max_px:
            raise wrong(f"{self.min_px} is more than max_px, {self.max_px}; lower it", "min_px")
        if self.multiple_of > self.max_px:
            raise wrong(f"{self.multiple_of} is more than max_px, {self.max_px}; lower it", "multiple_of")
        if not self.sizes and -(-self.min_px // self.multiple_of) > self.max_px // self.multiple_of:
            raise wrong(
                f"no multiple of {self.multiple_of} lies between min_px {self.min_px} and max_px {self.max_px}; change one",
                "multiple_of",
            )
        return self


def check_source(at: tuple[str | int, ...], source: Source, *, nowhere: bool) -> None:
    """Raise a fault of one source; `nowhere`: it may name no place."""
    if len(source.places) > 1:
        raise wrong(f"names {' and '.join(source.places)}, and weights are in one place; keep one of them", *at)
    if not source.places and not nowhere:
        raise wrong("needs one of path, hub and s3; name where the weights are", *at)
    if source.s3 is not None and not _BUCKET_URL.fullmatch(source.s3):
        raise wrong(f"must be s3://bucket/prefix, got {shown(source.s3)}; mend it", *at, "s3")
    for name in (*source.places, "file"):
        if "\0" in (text := getattr(source, name, "")):
            raise wrong(f"{shown(text)} has a NUL, which no name has; take it out", *at, name)
    if source.path is not None and source.path.startswith(PACKAGE):
        package, _, inside = source.path.removeprefix(PACKAGE).partition("/")
        if not all(word.isidentifier() for word in package.split(".")):
            raise wrong(f"must be {PACKAGE}NAME/FOLDER, got {shown(source.path)}; mend it", *at, "path")
        if PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts:
            raise wrong(f"must lie inside of its package, got {shown(source.path)}; mend it", *at, "path")
    if not isinstance(source, WeightsFile):
        return
    file = PurePosixPath(source.file)
    if file.is_absolute() or ".." in file.parts:
        raise wrong(f"must be a name below its folder, got {shown(source.file)}; mend it", *at, "file")
    wanted = source.format if isinstance(source, Denoiser) else "safetensors"
    if file.suffix != f".{wanted}":
        raise wrong(f"must be a .{wanted} file, got {shown(source.file)}; name such a file", *at, "file")


def check_code(code: Mapping[str, str]) -> None:
    """Raise a fault of the code that a card pins: a name that is no module's, a digest that is none, one name twice."""
    for name, sha256 in code.items():
        if not _MODULE_FILE.fullmatch(name):
            raise wrong(
                f"{shown(name)} cannot be imported: name Python files below the source's folder, folders and files by letters, "
                "digits and _, as transformer/my_blocks.py",
                name,
            )
        if not _SHA256.fullmatch(sha256):
            raise wrong(f"must be a sha256 of 64 lower-case hex digits, got {shown(sha256)}; sha256sum tells it", name)
        for folder in PurePosixPath(name).parents:
            if f"{folder}.py" in code:
                raise wrong(f"lies in a folder that is imported as {folder}.py is; rename one of them", name)


def wrong(text: str, *at: str | int) -> PydanticCustomError:
    return PydanticCustomError("farm", "{text}", {"text": text, "at": at})
