"""Every call that a farm's endpoint takes: its words, and how its answer is read. Knows nothing of connections.

Both clients make these, so that they cannot differ.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx2

from farm.client.answers import Answered, Image, Job, JobImage, Model, Renderer, Single, read, read_image, strange
from farm.errors import ControlError, InputError, ManifestError

READ_S = 60.0
PAGE = 500
JOBS_PAGE = 100
YAML_BYTES = 2**20
"""YAML takes long to read: of what is longer a farm is sent JSON."""
JSON = "application/json"
YAML = "application/yaml"

T = TypeVar("T")
Listed = TypeVar("Listed", bound=Answered)
Manifest = str | Path | Mapping[str, Any]
Tell = Literal["all", "new", "none"]
"""Whether a watch tells of all images, of those that land from now on, or of none."""
Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call. `read` takes an answer that is a success, and the farm's URL for its errors.

    `repeatable`: to make it twice changes nothing. `wait_s`: for the first byte of the answer; None for as long as it takes.
    """

    method: str
    path: str
    read: Callable[[httpx2.Response, str], T]
    query: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    content_type: str = JSON
    repeatable: bool = True
    wait_s: float = READ_S

    @property
    def headers(self) -> dict[str, str]:
        """What the call adds to every request's headers. Only what has a body says what it is."""
        return {"content-type": self.content_type} if self.content is not None else {}


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of a list, and the cursor of what follows; None at its end. `damaged`: what the farm cannot read."""

    items: tuple[T, ...]
    cursor: str | None
    damaged: tuple[Any, ...] = ()


# Pictures at once


def generate(prompt: str | Sequence[str], options: Mapping[str, Any], *, wait_s: float) -> Call[list[Image]]:
    """Draw pictures of a prompt, or of each of several."""
    body = {name: value for name, value in options.items() if value is not None}
    body |= {"prompt": prompt} if isinstance(prompt, str) else {"prompts": list(prompt)}
    body["response_format"] = "b64_json"

    def images(response: httpx2.Response, url: str) -> list[Image]:
        answer = _value(response, url)
        found = answer.pop("data", None)
        if not isinstance(found, list):
            raise strange(url, "no list of images")
        return [read_image(one, answer, url=url) for one in found]

    return Call("POST", "/v1/images/generations", images, content=_json(body), repeatable=False, wait_s=wait_s)


def models() -> Call[list[Model]]:
    """List the farm's models."""
    return Call("GET", "/v1/models", lambda response, url: list(_page(Model, response, url).items))


def model(name: str) -> Call[Model]:
    """Show one model."""
    return Call("GET", f"/v1/models/{_part(name)}", _one(Model))


# Jobs


def submit(manifest: Manifest, *, append: bool = False) -> Call[Job]:
    """Submit a manifest, a file or plain data: under its own name, so that to submit it twice is to submit it once.

    Raises ManifestError, a file's with its line.
    """
    if isinstance(manifest, Mapping):
        name, content, content_type = manifest.get("name"), _json(manifest), JSON
        if not isinstance(name, str) or not name:
            raise ManifestError(f"the manifest's name must be a text, got {name!r}; it names the job")
    else:
        name, content, content_type = _file(Path(manifest))
    query = {"append": "true"} if append else {}
    return Call("PUT", f"/v1/jobs/{_part(name)}", _one(Job), query, content, content_type, wait_s=600.0)


def jobs(cursor: str | None = None, *, limit: int = JOBS_PAGE) -> Call[Page[Job]]:
    """List jobs, newest first."""
    return Call("GET", "/v1/jobs", lambda response, url: _page(Job, response, url), _query(cursor=cursor, limit=limit))


def job(name: str) -> Call[Job]:
    """Show how a job stands."""
    return Call("GET", _job(name), _one(Job))


def say(
    name: str, word: str, said: Mapping[str, Any] | None = None, *, repeatable: bool = True
) -> Call[dict[str, Any]]:
    """Say something to a job: pause, resume, cancel, approve, change, retry."""
    body = {key: value for key, value in (said or {}).items() if value is not None}
    return Call(
        "POST", f"{_job(name)}/{word}", _value, content=_json(body), repeatable=repeatable, wait_s=600.0
    )  # to look for damaged images reads them all


def retry(name: str, *, images: str | None, damaged: bool, run: str | None) -> Call[dict[str, Any]]:
    """Open a pass over images of a job; made twice, it might open two."""
    which = {"which": "all"} if images == "all" else {"images": images}
    return say(name, "retry", {**which, "damaged": damaged or None, "run": run}, repeatable=False)


def events(name: str, tell: "Tell") -> str:
    """Return the path of a job's events."""
    return f"{_job(name)}/events?images={tell}"


def images(name: str, cursor: str | None = None, *, limit: int = PAGE) -> Call[Page[JobImage]]:
    """List the images of a job that have a row, in order."""

    def page(response: httpx2.Response, url: str) -> Page[JobImage]:
        return _page(JobImage, response, url)

    return Call("GET", f"{_job(name)}/images", page, _query(cursor=cursor, limit=limit))


def picture(name: str, index: int, run: str | None, *, thumbnail: bool) -> Call[bytes]:
    """Fetch a picture of a job."""
    query = _query(run=run, thumbnail=thumbnail or None)
    return Call("GET", f"{_job(name)}/images/{index:d}/content", lambda response, url: response.content, query)


def sheet(name: str) -> Call[bytes]:
    """Fetch a job's contact sheet, a PNG."""
    return Call("GET", f"{_job(name)}/sheet", lambda response, url: response.content)


# Kept pictures


def singles(
    cursor: str | None = None,
    *,
    q: str | None = None,
    owner: str | None = None,
    model: str | None = None,
    limit: int = PAGE,
) -> Call[Page[Single]]:
    """List kept pictures, newest first."""

    def page(response: httpx2.Response, url: str) -> Page[Single]:
        return _page(Single, response, url)

    return Call("GET", "/v1/images", page, _query(cursor=cursor, limit=limit, q=q, owner=owner, model=model))


def single(name: str) -> Call[Single]:
    """Show a kept picture's record."""
    return Call("GET", _single(name), _one(Single))


def content(name: str) -> Call[bytes]:
    """Fetch a kept picture's file."""
    return Call("GET", f"{_single(name)}/content", lambda response, url: response.content)


def keep(name: str, days: float | None) -> Call[Single]:
    """Keep a picture for so many days from now, or for good."""
    return Call("POST", f"{_single(name)}/keep", _one(Single), content=_json({} if days is None else {"days": days}))


def discard(name: str) -> Call[None]:
    """Delete a kept picture."""
    return Call("DELETE", _single(name), lambda response, url: None)


# Renderers


def renderers() -> Call[list[Renderer]]:
    """List the farm's renderers."""
    return Call("GET", "/v1/renderers", lambda response, url: list(_page(Renderer, response, url).items))


def drain(name: str, *, drained: bool) -> Call[Renderer]:
    """Give a renderer no more work, or work again."""
    word = "drain" if drained else "resume"
    return Call("POST", f"/v1/renderers/{_part(name)}/{word}", _one(Renderer), content=_json({}))


# Inside


def _part(text: str) -> str:
    """A name as one part of a path. Raises InputError for one that would be read as another path."""
    if text in ("", ".", ".."):
        raise InputError(f"{text!r} is no name; give the one that the farm lists")
    return quote(text, safe="")


def _job(name: str) -> str:
    return f"/v1/jobs/{_part(name)}"


def _single(name: str) -> str:
    return f"/v1/images/{_part(name)}"


def _query(**values: Value) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if value is not None
    }


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError) as exc:
        raise InputError(f"what is to be sent is no JSON: {exc}; give texts, numbers, lists and mappings") from exc


def _file(path: Path) -> tuple[str, bytes, str]:
    """A manifest's name and its text, checked here so that an error names the file and the line."""
    from farm.manifest import load_manifest

    loaded = load_manifest(path)
    name = loaded.manifest.name
    try:
        text = path.read_bytes()
    except OSError as exc:
        raise ManifestError(f"{path}: {exc.strerror}; name another file") from exc
    return (name, text, YAML) if len(text) <= YAML_BYTES else (name, _json(loaded.document.data), JSON)


def named(exc: ManifestError, manifest: Manifest) -> ManifestError:
    """Return what a farm says of a manifest with the file's own name where it speaks of the `manifest`."""
    if isinstance(manifest, Mapping) or not exc.message.startswith("manifest:"):
        return exc
    return ManifestError(f"{manifest}{exc.message.removeprefix('manifest')}")


def _value(response: httpx2.Response, url: str) -> dict[str, Any]:
    try:
        found = json.loads(response.content)
    except ValueError as exc:
        raise strange(url, "no JSON") from exc
    if not isinstance(found, dict):
        raise strange(url, "no JSON object")
    return found


def _one(kind: type[Listed]) -> Callable[[httpx2.Response, str], Listed]:
    return lambda response, url: read(kind, _value(response, url), url=url)


def _page(kind: type[Listed], response: httpx2.Response, url: str) -> Page[Listed]:
    found = _value(response, url)
    rows, cursor = found.get("data"), found.get("next_cursor")
    if not isinstance(rows, list) or not isinstance(cursor, str | None):
        raise strange(url, "no list")
    damaged = found.get("damaged")
    return Page(
        tuple(read(kind, row, url=url) for row in rows), cursor, tuple(damaged) if isinstance(damaged, list) else ()
    )


def changes(**given: Any) -> dict[str, Any]:
    """Return those changes of a job that are given. Raises ControlError for none."""
    found = {name: value for name, value in given.items() if value is not None}
    if not found:
        raise ControlError("nothing to change is given; give a priority, max_images, gpu_hours or finish_by")
    return found
