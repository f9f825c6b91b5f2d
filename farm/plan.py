"""A plan: everything that decides a pixel of a job, frozen, and image index <-> image by arithmetic.

Images lie in the order rows x sweep points x seeds, seeds fastest: `index = (row * points + point) * seeds + slot`.
Nothing of the job's size is ever built. Knows nothing of files, stores or devices; `created_at`, `run`, the owner, the
priority, the limits and the estimate are the only fields which may differ between two plans that draw the same pictures.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.cardparts import Source
from farm.errors import ManifestError, NewerVersionError
from farm.manifest import MAX_SEED, Manifest, Output
from farm.modelcard import ModelCard, ParamOverrides, RenderParams, merged
from farm.sweep import Template

VERSION = 2
"""Version 1 knew no owner and no pilot; its plans are read as having none."""
PART_ROWS = 65_536
MAX_IMAGES = 2**53
MAX_SHARD_IMAGES = 10_000
SHARD_SECONDS = 180.0
UNKNOWN_SPEED_BATCHES = 8

Scalar = str | int | float | bool | None


class Record(BaseModel):
    """Root of the records below: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Numerics(Record):
    """How pixels are computed. Equal numerics on one kind of device give equal bytes."""

    device: Literal["cuda", "cpu"]
    dtype: Literal["float32", "bfloat16", "float16"]
    batch: int = Field(gt=0, description="images per batch of one shape")
    threads: int = Field(gt=0, description="torch threads of a CPU renderer; 1 on a GPU")
    versions: dict[str, str] = Field(description="package -> version of what decides bytes")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image to render. `row` is its prompt's place in the prompt table, `key` the row's key where it has one."""

    index: int
    row: int
    key: str | None
    prompt: str
    seed: int
    params: RenderParams
    carry: dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of the prompt table: `overrides` are its own parameters, `carry` goes into the receipts as it is."""

    prompt: str
    key: str | None
    overrides: ParamOverrides
    carry: dict[str, Scalar]


class PromptTable(Record):
    """The frozen prompts. Rows lie in `parts` Parquet objects of `part_rows`, or follow from `template`."""

    rows: int = Field(gt=0)
    part_rows: int = Field(default=PART_ROWS, gt=0)
    parts: int = Field(ge=0, description="0 where there is a template")
    keyed: bool
    digest: str = Field(description="sha256 over order, keys, texts, overrides and carried columns")
    template: Template | None = None


class SeedRule(Record):
    """How an image's seed follows from its row and slot. The sweep has no part in it: all its points share seeds.

    `listed`: `seeds` as they stand. `shared`: root, root + 1, ... for every row. `slot` and `random`: a hash of
    root, row and slot. `key`: a hash of root, the row's key and slot.
    """

    rule: Literal["listed", "shared", "slot", "random", "key"]
    count: int = Field(gt=0, description="images per row and sweep point")
    root: int = Field(default=0, ge=0, le=MAX_SEED)
    seeds: tuple[int, ...] = Field(default=(), description="of the rule `listed`; what was -1 is drawn")

    def seed(self, row: int, key: str | None, slot: int) -> int:
        """Return the seed, 0 to 2**32 - 1, of one image."""
        match self.rule:
            case "listed":
                return self.seeds[slot]
            case "shared":
                return self.root + slot
            case "key":
                return _hash32(f"{self.root}\0key\0{slot}\0{key}")
            case _:
                return _hash32(f"{self.root}\0row\0{slot}\0{row}")


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


class Plan(Record):
    """One run of a job, frozen. `digest` covers what decides a pixel and how the images are cut into shards."""

    version: int = VERSION
    job: str
    run: str = Field(description="8 random hex digits; all of the run's objects lie under it")
    created_at: str = Field(description="ISO 8601, UTC")
    owner: str = Field(default="", description="who submitted it; shares of the farm are by owner")
    manifest: Manifest
    card: ModelCard
    prompts: PromptTable
    seeds: SeedRule
    sweep: tuple[ParamOverrides, ...] = Field(min_length=1, description="its points; one empty one without a sweep")
    params: RenderParams = Field(description="the card's defaults, the preset and the manifest's params, merged")
    numerics: Numerics
    output: Output
    shard_images: int = Field(gt=0)
    pilot: int | None = Field(default=None, gt=0, description="images of pass 1, where the others wait for approval")
    pilot_shard_images: int | None = Field(default=None, gt=0, description="of the pilot's shards, where there is one")
    images: int = Field(gt=0)
    estimated_seconds_per_image: float | None = Field(
        default=None, gt=0, description="of one renderer, as it was planned; None where nobody knew"
    )
    digest: str
    appended_to: str | None = Field(default=None, description="the run whose rows this one's follow")

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, data: Any) -> Any:
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise NewerVersionError(
                f"plan of job {data.get('job')}: version {version} was written by a newer farm, this one reads up to "
                f"{VERSION}; upgrade this farm"
            )
        return data

    @classmethod
    def build(
        cls,
        *,
        run: str,
        created_at: str,
        manifest: Manifest,
        card: ModelCard,
        prompts: PromptTable,
        seeds: SeedRule,
        sweep: tuple[ParamOverrides, ...],
        params: RenderParams,
        numerics: Numerics,
        shard_images: int,
        pilot: int | None = None,
        pilot_shard_images: int | None = None,
        owner: str = "",
        appended_to: str | None = None,
        estimated_seconds_per_image: float | None = None,
    ) -> Self:
        """Make a plan with its image count and digest; a pilot of all images or more is none.

        Raises ManifestError above 2**53 images.
        """
        images = prompts.rows * len(sweep) * seeds.count
        if images > MAX_IMAGES:
            raise ManifestError(
                f"{manifest.name}: {prompts.rows} prompts x {len(sweep)} sweep points x {seeds.count} seeds "
                f"are {images} images, more than the {MAX_IMAGES} a job may have; cut it into several jobs"
            )
        if pilot is not None and pilot >= images:
            pilot = None
        decides: dict[str, Any] = {
            "prompts": prompts.digest,
            "rows": prompts.rows,
            "model": card_identity(card, numerics.device),
            "seeds": seeds.model_dump(mode="json"),
            "sweep": [point.model_dump(mode="json") for point in sweep],
            "params": params.model_dump(mode="json"),
            "numerics": numerics.model_dump(mode="json"),
            "output": manifest.output.model_dump(mode="json"),
            "shard_images": shard_images,
        }
        if pilot is None:
            pilot_shard_images = None
        else:
            pilot_shard_images = pilot_shard_images or shard_images
            decides["pilot"] = {"images": pilot, "shard_images": pilot_shard_images}
        return cls(
            job=manifest.name,
            run=run,
            created_at=created_at,
            owner=owner,
            manifest=manifest,
            card=card,
            prompts=prompts,
            seeds=seeds,
            sweep=sweep,
            params=params,
            numerics=numerics,
            output=manifest.output,
            shard_images=shard_images,
            pilot=pilot,
            pilot_shard_images=pilot_shard_images,
            images=images,
            estimated_seconds_per_image=estimated_seconds_per_image,
            digest=canonical_digest(decides),
            appended_to=appended_to,
        )

    @property
    def priority(self) -> int:
        """The job's priority, 0 to 100."""
        return self.manifest.priority

    @property
    def shards(self) -> int:
        """How many shards it takes to render every image once, a pilot's and the others'."""
        pilot = self.pilot or 0
        return -(-pilot // self.pass_shard_images(1)) + -(-(self.images - pilot) // self.shard_images)

    def pass_shard_images(self, pass_number: int) -> int:
        """Images per shard of a pass: those of a pilot may be smaller."""
        if pass_number == 1 and self.pilot_shard_images is not None:
            return self.pilot_shard_images
        return self.shard_images

    def shard_range(self, shard: int) -> range:
        """Return the image indexes of one shard of a plan without a pilot. Raises IndexError for others' numbers."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"job {self.job} has shards 0 to {self.shards - 1}, not {shard}")
        start = shard * self.shard_images
        return range(start, min(start + self.shard_images, self.images))

    def locate(self, index: int) -> tuple[int, int, int]:
        """Return prompt row, sweep point and seed slot of an image. Raises IndexError when there is no such image."""
        if not 0 <= index < self.images:
            raise IndexError(f"job {self.job} has images 0 to {self.images - 1}, not {index}")
        rest, slot = divmod(index, self.seeds.count)
        row, point = divmod(rest, len(self.sweep))
        return row, point, slot

    def index(self, row: int, point: int, slot: int) -> int:
        """Return the image index of a prompt row, sweep point and seed slot."""
        return (row * len(self.sweep) + point) * self.seeds.count + slot

    def spec(self, index: int, row: PromptRow) -> ImageSpec:
        """Return what to render for image `index`; `row` must be the prompt row that `locate` names."""
        number, point, slot = self.locate(index)
        return ImageSpec(
            index=index,
            row=number,
            key=row.key,
            prompt=row.prompt,
            seed=self.seeds.seed(number, row.key, slot),
            params=merged(self.params, self.sweep[point], row.overrides),
            carry=row.carry,
        )


def shard_size(*, images: int, batch: int, renderers: int, seconds_per_image: float | None) -> int:
    """Return images per shard: about three minutes' work, at most a quarter of the images per renderer, whole batches.

    `images`: of the job, or of its pilot, whose shards have a size of their own: a pilot of 200 images is spread over all
    renderers, and does not cut the ten million that follow into its crumbs. At least one batch, at most 10,000
    images (one batch, where that is larger). Eight batches, the speed unknown.
    """
    if seconds_per_image is None or seconds_per_image <= 0:
        wanted = UNKNOWN_SPEED_BATCHES * batch
    else:
        wanted = int(min(SHARD_SECONDS / seconds_per_image, MAX_SHARD_IMAGES))
    wanted = min(wanted, images // (4 * max(renderers, 1)), MAX_SHARD_IMAGES)
    return max(wanted // batch, 1) * batch


def mean_work(params: RenderParams, points: Sequence[ParamOverrides]) -> float:
    """Return pixels x steps of an image, on average over a sweep's points: what its time is taken to grow with."""
    every = [merged(params, point) for point in points]
    return sum(one.width * one.height * one.num_inference_steps for one in every) / len(every)


def card_identity(card: ModelCard, device: Literal["cuda", "cpu"]) -> dict[str, Any]:
    """Return what of a card decides a pixel on one kind of device: where the revision is known the path has no part in it."""
    source = card.source
    return {
        "name": card.name,
        "family": card.family,
        "hub": source.hub,
        "revision": source.revision,
        "path": None if source.revision else source.path,
        "max_sequence_length": card.max_sequence_length,
        **{name: value for name, value in _other_weights(card, device).items() if value},
    }


def _other_weights(card: ModelCard, device: Literal["cuda", "cpu"]) -> dict[str, Any]:
    """What of a card is laid over its source, or set in its family; empty where it is nothing."""

    def identity(source: Source) -> dict[str, Any]:
        record = source.model_dump(mode="json", exclude_none=True)
        if source.revision:
            record.pop("path", None)
            record.pop("s3", None)
        return record

    return {
        "denoiser": card.denoiser and identity(card.denoiser),
        "decoder": card.decoder and identity(card.decoder),
        "quantise": dict(sorted(card.quantise.items())),
        "adapters": [identity(adapter) for adapter in card.adapters],
        "scheduler": card.scheduler and card.scheduler.model_dump(mode="json"),
        "acceleration": card.accelerated_on(device).model_dump(exclude_defaults=True),
        "options": dict(sorted(card.options.items())),
        "code": dict(sorted(card.code.items())),
    }


def drawing_identity(card: ModelCard, numerics: Numerics) -> str:
    """Return a digest of what is computed with, whatever is drawn: the model, dtype and versions. The batch may differ."""
    return canonical_digest(
        {"card": card_identity(card, numerics.device), "numerics": numerics.model_dump(exclude={"batch", "threads"})}
    )


def speed_identity(card: ModelCard, numerics: Numerics) -> str:
    """Return a digest of what decides how long a picture takes: the model and its dtype, whatever the versions."""
    return canonical_digest({"card": card_identity(card, numerics.device), "dtype": numerics.dtype})


def canonical_digest(value: Any) -> str:
    """Return the sha256 of a JSON value with sorted keys and no blanks."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
