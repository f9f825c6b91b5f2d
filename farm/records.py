"""The small JSON records of the ledger: what people said to a job, what it came to, what was measured.

Each carries the version that wrote it; one from a newer farm is refused, never guessed at.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.cardparts import PLAIN, Acceleration
from farm.errors import NewerVersionError
from farm.modelcard import RenderParams

VERSION = 2


class Record(BaseModel):
    """Root of the JSON records below: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = VERSION

    @model_validator(mode="before")
    @classmethod
    def _known_version(cls, data: Any) -> Any:
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise NewerVersionError(
                f"{cls.__name__.lower()} of version {version} was written by a newer farm, this one reads up to "
                f"{VERSION}; upgrade this farm"
            )
        return data


Action = Literal["pause", "resume", "cancel", "approve", "change"]


class Control(Record):
    """What somebody said to a job. Of `pause`, `resume` and `cancel` the last counts; of each changed value the last."""

    seq: int = Field(ge=1)
    action: Action
    at: str = Field(description="ISO 8601, UTC")
    by: str
    priority: int | None = Field(default=None, ge=0, le=100, description="changed to")
    max_images: int | None = Field(default=None, gt=0, description="changed to")
    gpu_hours: float | None = Field(default=None, gt=0, description="changed to")
    finish_by: str | None = Field(default=None, description="changed to; ISO 8601 with an offset")


@dataclass(frozen=True, slots=True)
class Standing:
    """What all that was said to a job comes to; None where the manifest's own value stands."""

    state: Literal["open", "paused", "cancelled"] = "open"
    approved: bool = False
    priority: int | None = None
    max_images: int | None = None
    gpu_hours: float | None = None
    finish_by: str | None = None


def standing(controls: Iterable[Control]) -> Standing:
    """Fold a job's controls, in their order."""
    found = Standing()
    for control in controls:
        match control.action:
            case "pause":
                found = replace(found, state="paused")
            case "cancel":
                found = replace(found, state="cancelled")
            case "resume":
                found = replace(found, state="open")
            case "approve":
                found = replace(found, approved=True)
            case "change":
                fields = ("priority", "max_images", "gpu_hours", "finish_by")
                given = {name: getattr(control, name) for name in fields if getattr(control, name) is not None}
                found = replace(found, **given)
    return found


DEVICE_STAGES = ("load", "encode", "denoise", "decode")
"""Stages of a receipt's seconds in which the device is in use; the others run beside it."""


def device_seconds(seconds: Mapping[str, float]) -> float:
    """Return for how long the device was in use, of seconds by stage."""
    return sum((seconds.get(stage, 0.0) for stage in DEVICE_STAGES), 0.0)


class Totals(Record):
    """What a job came to by the end of a pass: over all its images, the latest pass of each."""

    images: int = Field(ge=0)
    ok: int = Field(ge=0)
    failed: int = Field(ge=0)
    flagged: int = Field(ge=0, description="ok, and all one colour")
    failures_by_code: dict[str, int]
    bytes: int = Field(ge=0, description="of the pictures that are ok")
    seconds: dict[str, float] = Field(description="by stage, summed over renderers")
    renderers: int = Field(ge=0)
    started_at: str = Field(description="ISO 8601, UTC")
    finished_at: str = Field(description="ISO 8601, UTC")
    wall_seconds: float = Field(ge=0, description="in which a shard was in hand; longer pauses are left out")
    planned_gpu_seconds: float | None = Field(
        default=None, ge=0, description="what planning expected of `gpu_seconds`; None where the speed was not known"
    )

    @property
    def gpu_seconds(self) -> float:
        """Seconds in which renderers had their devices in use, summed over them and all passes; loading counts."""
        return round(device_seconds(self.seconds), 3)


class Tombstone(Record):
    """Says that a job is being deleted. `runs`: those that had objects when it was written."""

    job: str
    at: str = Field(description="ISO 8601, UTC")
    by: str
    runs: tuple[str, ...] = ()


Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
"""What somebody may have measured: at most some months."""
Moment = Annotated[float, Field(ge=1e-9, le=1e7, allow_inf_nan=False)]
"""The same of something that takes time at all."""
Count = Annotated[int, Field(gt=0, le=10**6)]


class ShapeSpeed(BaseModel):
    """How fast pictures of one size were drawn: seconds of one denoising step and of decoding, each an image's share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Count
    height: Count
    step_s: Moment
    decode_s: Seconds

    @property
    def pixels(self) -> int:
        """Width x height."""
        return self.width * self.height


class WorkingMemory(BaseModel):
    """What drawing took on a GPU beside the weights, GiB, at most: tensors, not what torch's allocator keeps in hand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encode_gib: float = Field(ge=0, description="a prompt")
    step_gib: float = Field(gt=0, description="a step, for 2**20 pixels that go through the denoiser together")
    decode_gib: float = Field(gt=0, description="2**20 pixels that are decoded together")
    identity: str = Field(description="digest of what was measured: model, dtype, versions")


class Stages(BaseModel):
    """What `farm bench` measured of a model on one kind of device, by stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_s: float = Field(ge=0, description="of the first load in a process")
    encode_s: float = Field(ge=0, description="a prompt, its encoder on the device")
    encoder_in_s: float | None = Field(
        default=None,
        ge=0,
        description="until the encoder is on the device, once a shard; None where it does not come and go",
    )
    denoiser_in_s: float | None = Field(
        default=None, ge=0, description="until the denoiser is back after that; None where nothing comes and goes"
    )
    guidance_scale: float = Field(ge=0)
    guided_above: float | None = Field(
        description="the guidance above which a step passes the denoiser twice, with and without the prompt; None: never"
    )
    shapes: tuple[ShapeSpeed, ...] = Field(min_length=1)
    batch: int = Field(gt=0)
    peak_gib: dict[str, float] = Field(description="the most held by phase: load, encode, denoise, decode")
    dtype: str
    quantise: dict[str, str] = Field(default={}, description="part -> how it was quantised")
    versions: dict[str, str]
    working: WorkingMemory | None = Field(default=None, description="None on a CPU, whose memory is nobody's alone")
    measured_at: str = Field(description="ISO 8601, UTC")

    def seconds_of(self, params: RenderParams) -> float:
        """Reckon an image's seconds: encoding, so many steps of its size, decoding."""
        denoise_s, decode_s = self.drawing_s(params)
        return self.encode_s + denoise_s + decode_s

    def encoder_s(self, params: RenderParams, prompts: int) -> float:
        """Reckon for how long the encoder is in, for so many prompts of a shard and the negative one of theirs."""
        return (self.encoder_in_s or 0.0) + (prompts + self._passes(params.guidance_scale) - 1) * self.encode_s

    def drawing_s(self, params: RenderParams) -> tuple[float, float]:
        """Reckon an image's seconds of denoising and of decoding."""
        step_s, decode_s = self._at(params.width * params.height)
        passes = self._passes(params.guidance_scale) / self._passes(self.guidance_scale)
        return params.num_inference_steps * step_s * passes, decode_s

    def _passes(self, guidance_scale: float) -> int:
        return 2 if self.guided_above is not None and guidance_scale > self.guided_above else 1

    def _at(self, pixels: int) -> tuple[float, float]:
        """Seconds of a step and a decode, on the line between the nearest sizes; beyond them in proportion to the pixels."""
        shapes = sorted(self.shapes, key=lambda shape: shape.pixels)
        above = next((shape for shape in shapes if shape.pixels >= pixels), shapes[-1])
        below = next((shape for shape in reversed(shapes) if shape.pixels <= pixels), shapes[0])
        if above.pixels <= below.pixels:
            by = pixels / above.pixels
            return above.step_s * by, above.decode_s * by
        share = (pixels - below.pixels) / (above.pixels - below.pixels)
        return (
            below.step_s + (above.step_s - below.step_s) * share,
            below.decode_s + (above.decode_s - below.decode_s) * share,
        )


class Profile(Record):
    """How fast one kind of device drew a model's pictures when last measured, by a job or by `farm bench`.

    `stages` are of the last `farm bench` there, where there was one.
    """

    model: str
    device: str
    acceleration: Acceleration = PLAIN
    identity: str | None = Field(
        default=None, description="digest of what was measured: model and dtype; None: unknown"
    )
    seconds_per_image: Moment
    width: Count
    height: Count
    num_inference_steps: Count
    batch: Count
    images: int = Field(gt=0, description="how many were measured")
    measured_at: str = Field(description="ISO 8601, UTC")
    stages: Stages | None = None

    def is_of(self, identity: str | None) -> bool:
        """Whether it was measured of that model in that dtype, as far as anybody knows."""
        return None in (self.identity, identity) or self.identity == identity

    def seconds_of(self, params: RenderParams) -> float:
        """Estimate an image's seconds: what was measured, scaled by its stages where they are known, else by pixels x steps."""
        if self.stages is None:
            work = params.width * params.height * params.num_inference_steps
            return self.seconds_per_image * work / (self.width * self.height * self.num_inference_steps)
        then = RenderParams(
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.stages.guidance_scale,
        )
        return self.seconds_per_image * self.stages.seconds_of(params) / self.stages.seconds_of(then)
