"""A request for images: its schema, and what it asks to be drawn. Pure.

OpenAI's fields under OpenAI's names, the farm's own beside them under diffusers' names. A field that is neither is refused
by name: nothing is passed over in silence.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from farm.errors import ManifestError, RequestError
from farm.lint import Advice, lint_prompt
from farm.manifest import MAX_SEED, Output
from farm.modelcard import ModelCard, ParamOverrides, RenderParams, merged, param_fault, resolved
from farm.plan import ImageSpec
from farm.request import card_advice
from farm.yamlfile import did_you_mean

MAX_IMAGES = 64
"""Images of one request: its answer holds them all. More are a job."""
MAX_PROMPT = 32_000
WARNINGS = 100
"""Warnings that one answer carries at most."""
Bits = Callable[[int], int]
"""From a count of bits to that many random ones."""

QUALITIES: Mapping[str, str | None] = {
    "auto": None,
    "low": "draft",
    "medium": "standard",
    "standard": "standard",
    "high": "final",
    "hd": "final",
}
"""OpenAI's words -> preset. A card that has a preset of that very name means its own; `standard`, `medium` and `auto` are the
card's defaults where it has no preset for them."""

NOT_HERE: Mapping[str, str] = {
    "background": "pictures have no transparency here",
    "input_fidelity": "pictures are drawn from text alone here",
    "moderation": "nothing is moderated here",
    "partial_images": "pictures come whole",
    "stream": "pictures come whole; GET /v1/jobs/{id}/events streams a job's",
    "style": "say it in the prompt",
    "image": "pictures are drawn from text alone here",
    "mask": "pictures are drawn from text alone here",
    "scheduler": "the model's card decides it",
    "sampler": "the model's card decides it",
    "batch_size": "the model's card decides it",
    **dict.fromkeys(("steps", "num_steps", "sampling_steps"), "it is called num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "it is called guidance_scale"),
    **dict.fromkeys(("negative", "neg_prompt"), "it is called negative_prompt"),
    **dict.fromkeys(("num_images", "num_images_per_prompt", "count"), "it is called n"),
    **dict.fromkeys(("format", "image_format"), "it is called output_format"),
    **dict.fromkeys(("preset",), "it is called quality"),
}

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]

_SIZE = r"(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})"


def _sized(size: str) -> str:
    if not re.fullmatch(_SIZE, size):
        raise RequestError(f"size: write WIDTHxHEIGHT such as 1024x1024, or auto, got {size[:60]!r}", "size")
    return size


Size = Annotated[str, AfterValidator(_sized), WithJsonSchema({"type": "string", "pattern": f"^{_SIZE}$"})]


class ImagesRequest(BaseModel):
    """What to draw. Fields of the OpenAI API, then the farm's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="a model card's name; may be left out where a farm has one",
    )
    prompt: Prompt | None = Field(default=None, description="what to draw; plain text, or structured XML")
    n: int | None = Field(default=None, ge=1, le=MAX_IMAGES, description="images of each prompt; 1 where empty")
    size: Size | None = Field(default=None, description="WIDTHxHEIGHT in pixels, or auto: the model's own")
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="the picture itself, base64, or a link to it; b64_json where empty"
    )
    output_format: Literal["png", "webp", "jpeg"] | None = Field(default=None, description="png where empty")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="quality of webp and jpeg; 100 is the best, 95 where empty"
    )
    quality: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="a preset of the card, or OpenAI's words: low is draft, medium and standard are standard, high and hd are "
        "final, auto is none",
    )
    user: str | None = Field(default=None, max_length=256, description="whom you ask for; kept with the image")
    prompts: tuple[Prompt, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_IMAGES,
        strict=False,  # a list will do
        description="several prompts in place of one, n images of each",
    )
    negative_prompt: Prompt | None = Field(
        default=None, description="what not to draw; @NAME is the card's of that name"
    )
    num_inference_steps: int | None = Field(default=None, ge=1, le=10_000, description="denoising steps")
    guidance_scale: float | None = Field(default=None, ge=0, le=1000, description="how closely to follow the prompt")
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="of each prompt's first image; seed + 1 of the next; random where empty",
    )
    width: int | None = Field(default=None, ge=1, le=99_999, description="pixels")
    height: int | None = Field(default=None, ge=1, le=99_999, description="pixels")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                shown = str(name)[:60]
                why = NOT_HERE.get(shown)
                hint = f": {why}" if why else did_you_mean(shown, list(cls.model_fields)) or "; leave it out"
                raise RequestError(f"{shown} is not a field of this endpoint{hint}", shown)
        return data

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if (self.prompt or "").strip() and self.prompts:
            raise RequestError("prompt and prompts are both given; keep one of them", "prompts")
        for at, text in enumerate(self.texts):
            if not text.strip():
                name = f"prompts.{at}" if self.prompts else "prompt"
                raise RequestError(f"{name} is empty; say what to draw", name)
        if len(self.texts) * (self.n or 1) > MAX_IMAGES:
            raise RequestError(
                f"{len(self.texts)} prompts with {self.n} images each are more than {MAX_IMAGES}; send less, or submit a job",
                "n",
            )
        if self.size is not None and (self.width or self.height):
            raise RequestError("size stands beside width or height; keep one of them", "size")
        if self.output_compression is not None and self.output_format in (None, "png"):
            raise RequestError(
                "output_compression has no effect on png, which is lossless; leave it out, or use output_format: webp",
                "output_compression",
            )
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts; an empty one where there is none."""
        return self.prompts or (self.prompt or "",)

    @property
    def output(self) -> Output:
        """What files the pictures become."""
        quality = None if self.output_compression is None else max(1, self.output_compression)
        return Output(format=self.output_format or "png", quality=quality, thumbnails=False)


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a request comes to: its images in order, prompts first, then each prompt's seeds; `preset`: of the card."""

    params: RenderParams
    specs: tuple[ImageSpec, ...]
    preset: str | None = None


def drawing_of(asked: ImagesRequest, card: ModelCard, *, bits: Bits) -> Drawing:
    """Work out the images of a request; `bits` draws the seeds that it leaves open. Raises RequestError naming the field."""
    overrides = {
        name: getattr(asked, name)
        for name in ("negative_prompt", "num_inference_steps", "guidance_scale", "width", "height")
    }
    if asked.size not in (None, "auto"):
        width, height = re.findall(r"\d+", str(asked.size))
        overrides |= {"width": int(width), "height": int(height)}
    preset = _preset(asked.quality, card)
    chosen = ParamOverrides() if preset is None else card.presets[preset]
    try:
        params = resolved(card, merged(card.defaults, chosen, ParamOverrides(**overrides)))
    except ManifestError as exc:
        raise RequestError(exc.message, "negative_prompt") from exc
    fault = param_fault(card, params)
    if fault is not None:
        size = asked.size not in (None, "auto") and fault.name in ("width", "height")
        raise RequestError(fault.text, "size" if size else fault.name)
    count = asked.n or 1
    specs = []
    for row, prompt in enumerate(asked.texts):
        for slot in range(count):
            seed = bits(32) if asked.seed is None else (asked.seed + slot) % (MAX_SEED + 1)
            specs.append(
                ImageSpec(
                    index=row * count + slot, row=row, key=None, prompt=prompt, seed=seed, params=params, carry={}
                )
            )
    return Drawing(params, tuple(specs), preset)


def advice_on(asked: ImagesRequest, card: ModelCard, preset: str | None) -> tuple[Advice, ...]:
    """What is known against a request: of its model's card, and of each of its different prompts."""
    found = list(card_advice(card, preset))
    for at, text in enumerate(asked.texts):
        if text in asked.texts[:at]:
            continue
        name = f"prompts.{at}" if asked.prompts else "prompt"
        for one in lint_prompt(text, family=card.family, max_tokens=card.max_sequence_length):
            found.append(Advice(one.code, one.text, f"{name}, {one.where}" if one.where else name))
    return tuple(found[:WARNINGS])


def _preset(quality: str | None, card: ModelCard) -> str | None:
    """The card's preset of that name, or of OpenAI's word; None for the card's defaults. Raises RequestError."""
    if quality is None or quality in card.presets:
        return quality
    if quality in QUALITIES:
        preset = QUALITIES[quality]
        if preset in card.presets:
            return preset
        if preset in (None, "standard"):
            return None
    near = did_you_mean(quality, list(card.presets)) or f"; it has {', '.join(card.presets) or 'none'}"
    raise RequestError(f"{card.name} has no preset {quality[:60]!r}{near}", "quality")
