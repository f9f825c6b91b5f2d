"""An image of a job as JSON: its row, with links in place of keys."""

import math
from dataclasses import dataclass

from pydantic import BaseModel, Field

from farm.plan import Plan, Scalar
from farm.receipt import ImageRow
from farm.server.errors import scrubbed
from farm.server.links import LINK_S, image_url
from farm.storage.base import ObjectStore


class ImageRecord(BaseModel):
    """What became of one image of a job, by its latest pass."""

    job: str
    run: str
    index: int
    key: str | None
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    status: str = Field(description="ok or failed")
    url: str | None = Field(description="of the picture, null where it failed; signed ones hold for an hour")
    thumbnail_url: str | None
    size_bytes: int | None
    sha256: str | None
    phash: str | None
    flag: str | None = Field(description="`black` or `constant` where the picture is all one colour")
    error_code: str | None
    error_message: str | None
    pass_number: int
    seconds: float = Field(description="its share of its batch's time")
    renderer: str
    device: str
    warnings: str | None = Field(description="codes of the advice on the prompt, with commas between")
    carry: dict[str, Scalar] = Field(description="columns carried from the prompts")


@dataclass(frozen=True, slots=True)
class Links:
    """Makes the addresses of a job's pictures. `base`: what the endpoint's own begin with."""

    store: ObjectStore
    base: str

    def of(self, plan: Plan, row: ImageRow, *, thumbnail: bool = False) -> str | None:
        """Return the address of a row's picture, None where it has none."""
        key = row.thumbnail if thumbnail else row.object
        if key is None:
            return None
        own = image_url(self.base, plan.job, plan.run, row.index, thumbnail=thumbnail)
        return self.store.presign(key, LINK_S) or own


def image_record(plan: Plan, row: ImageRow, links: Links) -> ImageRecord:
    """Return a row as a record. JSON has no NaN and no infinity: carried ones are null."""
    fields = {name: getattr(row, name) for name in ImageRecord.model_fields if hasattr(row, name)}
    if row.error_message is not None:
        fields["error_message"] = scrubbed(row.error_message, store=links.store.url)
    fields["carry"] = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.carry.items()
    }
    return ImageRecord(
        job=plan.job,
        run=plan.run,
        url=links.of(plan, row),
        thumbnail_url=links.of(plan, row, thumbnail=True),
        **fields,
    )
