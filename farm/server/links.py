"""Addresses of pictures in answers: straight from the store where it signs links, else through the endpoint."""

from urllib.parse import quote

from fastapi import Request

from farm.settings import Settings

LINK_S = 3600
"""For so long a signed link works."""


def base_url(request: Request, settings: Settings) -> str:
    """Return what the endpoint's own links begin with, without a slash at the end."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    # Not the request's own scheme: behind who ends TLS it is HTTP, and a header that says otherwise anybody can send.
    scheme = "https" if settings.tls_cert or settings.tls_proxy else "http"
    return str(request.base_url.replace(scheme=scheme)).rstrip("/")


def single_url(base: str, id: str) -> str:
    """Return the endpoint's address of a single image's picture."""
    return f"{base}/v1/images/{quote(id, safe='')}/content"


def image_url(base: str, job: str, run: str, index: int, *, thumbnail: bool = False) -> str:
    """Return the endpoint's address of a picture of a job."""
    small = "&thumbnail=true" if thumbnail else ""
    return f"{base}/v1/jobs/{quote(job, safe='')}/images/{index}/content?run={quote(run, safe='')}{small}"
