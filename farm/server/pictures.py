"""Picture files as answers: cached by what is in them, and never taken for a page."""

from typing import Any

from fastapi import Request
from starlette.responses import Response

_FILE = {"schema": {"type": "string", "format": "binary"}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the picture file",
        "content": dict.fromkeys(("image/png", "image/webp", "image/jpeg"), _FILE),
    },
    304: {"description": "the client has it already"},
}
"""What a route of pictures declares that it answers."""


def unchanged(request: Request, etag: str) -> Response | None:
    """Return the answer to a client that has this version already, else None."""
    asked = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    return Response(status_code=304, headers=_headers(etag)) if f'"{etag}"' in asked or "*" in asked else None


def picture(data: bytes, *, content_type: str, etag: str, name: str) -> Response:
    """Return a picture file. `name`: what it is called where somebody saves it, of letters, digits, `.`, `-` and `_`."""
    headers = _headers(etag) | {"content-disposition": f'inline; filename="{name}"'}
    return Response(data, media_type=content_type, headers=headers)


def content_type_of(key: str) -> str:
    """Return the media type of a picture by its key's ending."""
    endings = {"png": "image/png", "webp": "image/webp", "jpg": "image/jpeg", "jpeg": "image/jpeg"}
    return endings.get(key.rpartition(".")[2], "application/octet-stream")


def _headers(etag: str) -> dict[str, str]:
    return {"etag": f'"{etag}"', "cache-control": "private, no-cache", "content-security-policy": "default-src 'none'"}
