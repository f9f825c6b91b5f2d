"""What a farm answers, as records. Fields that a newer farm adds are kept in `model_extra`, and break nothing."""

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from farm.errors import FarmError, FarmUnavailableError, PictureError, error_of

if TYPE_CHECKING:
    from PIL import Image as Pillow

ENDED = frozenset({"done", "cancelled", "deleted"})
"""States of a job in which nothing of it is rendered any more unless somebody says so."""

Record = TypeVar("Record", bound=BaseModel)


class Answered(BaseModel):
    """Root of what is read from JSON. `record` has all of it as it came."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @property
    def record(self) -> dict[str, Any]:
        """Return every field, those that this version has no name for too."""
        return self.model_dump(mode="json")


class Run(Answered):
    """One run of a job; more than one where rows were appended. `totals`: what it came to, None while it is open."""

    run: str
    pass_number: int = 1
    images: int = 0
    pilot: int | None = None
    shards: int = 0
    shards_done: int = 0
    totals: dict[str, Any] | None = None


class Progress(Answered):
    """A snapshot of a job at work, as in `progress` events. `fraction` counts the steps of shards in hand."""

    state: str
    job: str = ""
    pass_number: Annotated[int, BeforeValidator(lambda value: 1 if value is None else value)] = 1
    images: int = 0
    done: int = 0
    failed: int = 0
    fraction: float = 0.0
    images_per_s: float | None = None
    eta_s: float | None = None
    renderers: int = 0
    renderers_busy: int = 0
    message: str | None = None


class Job(Answered):
    """How a job stands. `done` counts images that have a row, failed ones too; `said_last`: the last control; `live`: what a
    farm has in hand of it."""

    job: str
    state: str
    model: str = ""
    owner: str = ""
    priority: int = 50
    finish_by: str | None = None
    gpu_hours: float | None = None
    max_images: int | None = None
    approved: bool = False
    said_last: dict[str, Any] | None = None
    images: int = 0
    done: int = 0
    failed: int = 0
    created_at: str = ""
    finished_at: str | None = None
    runs: tuple[Run, ...] = ()
    live: Progress | None = None

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What the farm warned of when it was submitted: `code`, `text` and `where` of each."""
        told = (self.model_extra or {}).get("warnings")
        return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []

    @property
    def ended(self) -> bool:
        """Whether nothing of it is rendered any more unless somebody says so."""
        return self.state in ENDED


class JobImage(Answered):
    """An image of a job: the row of the latest pass that has one. `url`: its picture, none where it failed."""

    index: int
    run: str = ""
    pass_number: int = 1
    key: str | None = None
    prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    status: str = "ok"
    url: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    flag: str | None = None
    error_code: str | None = None
    error_message: str | None = None


class Readiness(Answered):
    """How soon a model draws. `state`: loaded, warm, cold, unsuited, unknown; seconds are None where nobody knows."""

    state: str = "unknown"
    renderers: int = 0
    load_seconds: float | None = None
    wait_seconds: float | None = None
    reason: str | None = None


class Model(Answered):
    """A model of the farm."""

    id: str
    title: str = ""
    readiness: Readiness = Readiness()


class Renderer(Answered):
    """A renderer of the farm."""

    name: str
    state: str = ""


class Single(Answered):
    """A picture of the endpoint as the farm keeps it."""

    id: str
    seed: int | None = None
    prompt: str = ""
    model: str = ""
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a farm told of a job: `kind` is `progress`, `image`, `state` and their like. `id` is its place."""

    kind: str
    data: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture that a farm drew at once. `data` is the file; `seconds` its time on the device.

    `metadata`: all that the farm told of it and of its request, such as `model` and `size`. By its `id` the farm keeps it for a
    time. `error`: why it alone of several could not be drawn; `data` is empty then.
    """

    data: bytes = field(repr=False)
    seed: int
    seconds: float
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    error: FarmError | None = None

    @property
    def suffix(self) -> str:
        """`.png`, `.webp` or `.jpg`, by the file's first bytes."""
        if self.data[:4] == b"RIFF":
            return ".webp"
        return ".jpg" if self.data[:2] == b"\xff\xd8" else ".png"

    def pil(self) -> "Pillow.Image":
        """Return the picture as Pillow has it, decoded. Raises PictureError, or why it was not drawn."""
        from PIL import Image as Pillow

        if self.error is not None:
            raise self.error
        try:
            picture = Pillow.open(io.BytesIO(self.data))
            picture.load()
        except (OSError, SyntaxError, ValueError) as exc:
            raise PictureError(f"image {self.id or self.seed} cannot be decoded: {exc}; ask for it again") from exc
        return picture

    def save(self, path: str | Path) -> Path:
        """Write the file as it is, with its provenance; it may replace one. Raises PictureError, or why it was not drawn."""
        if self.error is not None:
            raise self.error
        path = Path(path)
        try:
            path.write_bytes(self.data)
        except OSError as exc:
            raise PictureError(f"{path} cannot be written: {exc.strerror}; name another file") from exc
        return path


def read(kind: type[Record], value: Any, *, url: str) -> Record:
    """Read one record. Raises FarmUnavailableError for what is none: then no farm answered, or a much newer one."""
    try:
        return kind.model_validate(value)
    except ValidationError as exc:
        fault = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the whole"
        raise strange(url, f"no {kind.__name__} ({where}: {fault['msg']})") from exc


def read_image(value: Any, shared: Mapping[str, Any], *, url: str) -> Image:
    """Read one picture of an answer to `generate`; `shared` is told of all of them. Raises FarmUnavailableError."""
    if not isinstance(value, dict):
        raise strange(url, "an image that is no object")
    told = {**shared, **{name: one for name, one in value.items() if name != "b64_json"}}
    failed, picture = value.get("error"), value.get("b64_json")
    error: FarmError | None = None
    if isinstance(failed, dict):
        error = error_of(str(failed.get("code")), str(failed.get("message")))
    elif not isinstance(picture, str):
        raise strange(url, "an image without its picture")
    try:
        return Image(
            data=b"" if error else base64.b64decode(str(picture), validate=True),
            seed=int(told["seed"]),
            seconds=float(told.get("seconds") or 0.0),
            id=str(told.get("id") or ""),
            metadata=told,
            error=error,
        )
    except (binascii.Error, KeyError, TypeError, ValueError) as exc:
        raise strange(url, "an image that cannot be read") from exc


def strange(url: str, what: str) -> FarmUnavailableError:
    """Return the error of an answer that no farm of this version gives."""
    return FarmUnavailableError(f"{url} answered with {what}; is it a farm's endpoint, and as new as this client?")
